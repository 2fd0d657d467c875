# make serve          install on first use, then serve the built-in model   (ARGS="--port 8000 ..." passes flags)
# make test           the whole suite but the long tests                    (ARGS="tests/server -k size" selects)
# make test-long      the tests that take minutes
# make test-gpu       the tests that need CUDA
# make lint           style, types and import rules
# make docs           write the generated tables of the docs anew
#
# PYTHON picks the interpreter for a new environment (3.11 to 3.13), VENV its folder. JOBS is the number of processes that
# test at a time; JOBS=0 tests in pytest's own, for --pdb and -s.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
# A file's tests stay together, with the server or the ranks that they share.
PARALLEL = --numprocesses $(JOBS) --dist loadfile
# What pytest answers when no test is selected, which is no failure for the kinds that may be missing.
NONE_COLLECTED := 5
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-long test-gpu lint docs clean

serve: $(VENV)/.served
	@exec $(BIN)/photogram serve $(ARGS)

test: $(VENV)/.tested
	$(BIN)/python -m pytest $(PARALLEL) -m "not long and not gpu" $(ARGS)

test-long: $(VENV)/.tested
	$(BIN)/python -m pytest -m "long and not gpu" $(ARGS) || [ $$? -eq $(NONE_COLLECTED) ]

test-gpu: $(VENV)/.tested
	$(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? -eq $(NONE_COLLECTED) ]

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.tested
	$(BIN)/python tools/docs_tables.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# Each stamp says what was installed and is made anew when pyproject.toml or constraints.txt is younger.
$(VENV)/.served: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable .
	@touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(VENV)/.made
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.served

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "photogram needs Python 3.11 to 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another: make $(firstword $(MAKECMDGOALS) serve) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
