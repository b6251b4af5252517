# make demo: the main job on real input.  make test: all tests.  Both set themselves up.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

.PHONY: help setup demo test lint bench clean

help:
	@echo "make setup   a virtual environment in .venv with everything pinned, and the data"
	@echo "make demo    real MiniLM-L6, sparse, on the simulated accelerator, checked byte for byte (about 15 minutes)"
	@echo "make test    all tests"
	@echo "make lint    style and types"
	@echo "make bench   all measurements, an hour or more; ARGS=utilisation for one"
	@echo "make clean   remove generated files (not .venv)"

setup: $(SETUP)

$(SETUP): pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	@touch $@

demo: $(SETUP)
	$(BIN)/nmforge demo $(ARGS)

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(SETUP)
	$(BIN)/python -m benchmarks $(or $(ARGS),--slow)

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
