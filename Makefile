# Every target sets up what it needs in .venv on its first run, and nothing on the next.
# PIP_FLAGS is handed to pip, for example to name an index that has the smaller CPU build of torch.

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)

# One thread for each test process: tests run side by side, and models are tiny.
export OMP_NUM_THREADS ?= 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check docs serve coverage format clean

help:
	@echo "make demo      prune and distill two nets on real MNIST; writes examples/output/"
	@echo "make test      run the test-suite"
	@echo "make check     format, lint, types, imports"
	@echo "make docs      build the site, strictly, into site/"
	@echo "make serve     show the site while it is written"
	@echo "make coverage  the test-suite, with the coverage of src"
	@echo "make format    let ruff rewrite the code"
	@echo "make clean     remove the virtual environment and every cache"

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layers.py

docs: $(VENV)/.dev
	$(BIN)/zensical build --strict --clean

serve: $(VENV)/.dev
	$(BIN)/zensical serve

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --cov=netopt --cov-report=term

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .coverage dist site examples/output

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "netopt needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[examples]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $@
