# make demo   set up, train MACE and MACE-MARA on the bundled data, write the comparison report
# make test   set up, then lint, type check and run the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types parity clean

demo: $(STAMP)
	$(BIN)/steradian demo --out demo_output

test: $(STAMP) lint types
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "steradian needs Python 3.11 or newer; set PYTHON=python3.11 (or newer)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

# the peer packages are installed into .venv-parity-NAME, never into .venv
parity: $(STAMP)
	bash tests/parity/remake.sh

clean:
	rm -rf $(VENV) build dist demo_output
