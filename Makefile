# make demo   set up, train MACE and MACE-MARA on the bundled data, write the comparison report
# make test   set up, then lint, check imports and types, and run the tests in two processes (JOBS=8: in eight)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

JOBS   ?= 2

.PHONY: demo test lint imports types parity clean

demo: $(STAMP)
	$(BIN)/steradian demo --out demo_output

test: $(STAMP) lint imports types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: $(STAMP)
	$(BIN)/lint-imports

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
