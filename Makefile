# Every target sets up what it needs in .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools
# Python compiles what is imported, once; to compile all that is installed would take as long as to install it.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# The tensors of the tests and benchmarks are small: threads would only wait for each other.
export OMP_NUM_THREADS := 1

# An environment whose making failed is made again.
.DELETE_ON_ERROR:

.PHONY: demo test check fuzz bench bench-quality accept-gpu package docs clean

demo: $(VENV)/demo-installed  ## measure, select and compare on handwritten digits; table and figure
	$(BIN)/fastsched demo --output demo-output

test: check  ## check, then the whole test suite
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/dev-installed  ## lint, format, order of imports between layers, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pyright --pythonpath $(BIN)/python

fuzz: $(VENV)/dev-installed  ## 10,000 odd networks, pipelines, arguments and files, and 50 kills: about ten minutes on two cores
	FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/python -m pytest --numprocesses 2 tests/fuzz

bench: $(VENV)/dev-installed  ## speed of the ops on this machine
	$(BIN)/python -m pytest --benchmark-only $(addprefix benchmarks/speed/,level_gram.py measured_gram.py hutchinson.py)

bench-quality: $(VENV)/dev-installed  ## sampling error against every published way of choosing steps; QUICK=1 for a few cells
	$(BIN)/python -m benchmarks.quality.limit
	$(BIN)/python -m benchmarks.quality.run $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.quality.summary

accept-gpu:  ## a GPU's verdict, with the PYTHON that is there; WHEELS=folder adds packages that it lacks
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target build/wheels $(WHEELS)/*.whl)
	PYTHONPATH=build/wheels:. $(PYTHON) -m benchmarks.accept_gpu $(ARGS)

# The tools have a virtual environment of their own: they are no part of what the package needs.
package: $(TOOLS)/package-installed  ## build the source distribution and the wheel in dist/, and check both
	rm -rf build dist
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/twine check --strict dist/*
	$(TOOLS)/bin/check-wheel-contents --toplevel fastsched dist/*.whl

docs: $(TOOLS)/docs-installed  ## build the documentation in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/bin/mkdocs build --strict --quiet

# Without the package: the API is read from its source, so torch is not needed.
$(TOOLS)/docs-installed: constraints.txt | $(TOOLS)/bin/python
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

$(TOOLS)/package-installed: constraints.txt | $(TOOLS)/bin/python
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		build twine check-wheel-contents
	touch $@

$(TOOLS)/bin/python:
	$(PYTHON) -m venv $(TOOLS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev-installed: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) demo-output site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
