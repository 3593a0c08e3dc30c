# Every target sets up what it needs in .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The tensors of the tests and benchmarks are small: threads would only wait for each other.
export OMP_NUM_THREADS := 1

.PHONY: demo test check fuzz bench bench-quality accept-gpu clean

demo: $(VENV)/demo-installed  ## measure, select and compare on handwritten digits; table and figure
	$(BIN)/fastsched demo --output demo-output

test: check  ## check, then the whole test suite
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/dev-installed  ## lint, format, order of imports between rooms, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

fuzz: $(VENV)/dev-installed  ## 10,000 odd networks, arguments and files, and 50 kills: about ten minutes on two cores
	FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/python -m pytest --numprocesses 2 tests/fuzz

bench: $(VENV)/dev-installed  ## speed of the ops on this machine
	$(BIN)/python -m pytest benchmarks/speed --benchmark-only

bench-quality: $(VENV)/dev-installed  ## sampling error against every published way of choosing steps; QUICK=1 for a few cells
	$(BIN)/python -m benchmarks.quality.limit
	$(BIN)/python -m benchmarks.quality.run $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.quality.summary

accept-gpu:  ## a GPU's verdict, with the PYTHON that is there; WHEELS=folder adds packages that it lacks
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/wheels $(WHEELS)/*.whl)
	PYTHONPATH=build/wheels:. $(PYTHON) -m benchmarks.accept_gpu $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev-installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
