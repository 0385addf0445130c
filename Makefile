# Two commands matter: `make serve` and `make test`. Both make the environment first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# A run-time environment, and the same with what the tests need. Reinstalled when what they are made from changes.
RUNTIME := $(VENV)/.runtime
TESTING := $(VENV)/.testing

.PHONY: help serve test lint types pytest doctor gpu-wheels clean

help:
	@echo "make serve   install, fetch the default model, serve it on http://127.0.0.1:8000 (ARGS='--port 9000')"
	@echo "make test    install, then ruff, mypy and pytest: all that has to pass"
	@echo "make doctor  what this machine has, and which kernel each part will use"
	@echo "make gpu-wheels FOLDER=wheels   what a GPU machine without a network lacks for python -m loadtest.gpu"
	@echo "make clean   remove the environment and caches"

# Not empty where ARGS says which model to serve.
NAMED_MODEL = $(filter-out -%,$(firstword $(ARGS)))$(findstring --config,$(ARGS))$(findstring model.path,$(ARGS))

# The default model is fetched here, at the terminal, for the sake of its progress bar; if that fails, serve says why.
serve: $(RUNTIME)
	@$(if $(NAMED_MODEL),,$(BIN)/python -m engine.models.default_model >/dev/null || true)
	@exec $(BIN)/peregrine serve $(ARGS)

doctor: $(RUNTIME)
	@$(BIN)/peregrine doctor

gpu-wheels: $(RUNTIME)
	@$(BIN)/python -m loadtest.gpu wheels $(or $(FOLDER),wheels)

test: lint types pytest

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTING)
	$(BIN)/mypy

pytest: $(TESTING)
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Peregrine needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make serve PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@echo "compiling the CPU kernels (once, about fifteen seconds)"
	@$(BIN)/python -c 'import kernels.numba.program, kernels.numba.levels'
	@touch $@

$(TESTING): $(RUNTIME)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
