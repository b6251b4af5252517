"""Imports run one way (docs/architecture.md), and each module has a test of its name or is named here."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "algo": {"algo"},
    "models": {"models"},
    "hw": {"hw"},
    "compiler": {"compiler", "algo", "hw"},
    "sim": {"sim", "hw", "compiler", "algo"},
    "nmforge": {"nmforge", "sim", "hw", "compiler", "algo", "models"},
}


def imported(path):
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ALLOWED or top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_networks_need_no_framework():
    """`models/` is read as the reference: torch, files of weights, Hungarian matching, words; no timm, torchvision, mmdet, ..."""
    allowed = {"models", "torch", "safetensors", "scipy", "tokenizers", "numpy", *sys.stdlib_module_names}
    for path in (ROOT / "models").glob("*.py"):
        strange = {name.split(".")[0] for name in imported(path)} - allowed
        assert not strange, f"{path.name} imports {', '.join(strange)}"


def test_nothing_is_pickled():
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "import pickle" not in text and "torch.save(" not in text, path
            # other people's checkpoints may be read, but nothing of them but tensors
            assert text.count("torch.load(") == text.count("weights_only=True"), path
