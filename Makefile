# Sets up .venv from constraints.txt, then runs; nothing but Python and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo pictures test types tests nightly clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sfumato needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/sfumato demo

pictures: demo
	$(BIN)/python benchmarks/pictures.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types tests

types: setup
	$(BIN)/pyright

tests: setup
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

nightly: setup
	$(BIN)/pytest -m nightly

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
