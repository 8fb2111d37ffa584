# Both targets do all of their own set-up: a virtual environment, the install, the run. They need Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/splitfold demo

test: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/splitfold-*.whl
	cd tests && ../$(BIN)/python -m pytest -n auto --dist loadfile -c ../pyproject.toml --rootdir .. .

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "splitfold needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet -e .
	touch $@

# The CPU build of torch first: without it pip may take one with gigabytes of CUDA libraries.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist splitfold-demo *.egg-info
