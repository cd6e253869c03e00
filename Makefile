# Everything a user runs. `make quickstart` and `make test` create what they need and can be run again at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := $(VENV)/audit

# One thread per process: several ranks share the machine, and small tensors lose time in thread pools.
export OMP_NUM_THREADS ?= 1

# Two test files run at a time. Those with ranks of their own come last: ranks wait for each other and leave time free.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile
UNIT_TESTS := tests/unit $(TWO_AT_A_TIME)
RANK_TESTS := tests/distributed tests/integration $(TWO_AT_A_TIME)
# Both parts run to their end, whatever the first one finds.
run-tests = @status=0; \
	$(BIN)/python -m pytest $(1) --durations=10 $(UNIT_TESTS) || status=1; \
	$(BIN)/python -m pytest $(1) --durations=10 $(RANK_TESTS) || status=1; \
	exit $$status

.DEFAULT_GOAL := help
.PHONY: help setup quickstart study test test-all lint audit format docs-tables golden clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv from the pinned constraints

# A torch that is already in .venv (a CUDA build, see README) stays: its version matches the constraint.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP) ## train a small model on real code with strided EBFT and write a report (about 10 minutes)
	$(BIN)/python tools/quickstart.py $(QUICKSTART_FLAGS)

study: $(STAMP) ## the quickstart's question over several seeds, with every control (hours; not part of the quickstart)
	$(BIN)/python tools/experiment.py configs/experiments/code.yaml $(STUDY_FLAGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## the default test suite (at most 10 minutes on 2 cores)
	$(call run-tests,-m "not slow")

test-all: lint ## everything, also the slow matrices (at most 90 minutes on 2 cores)
	$(call run-tests,)

# In an environment of its own: what it needs is no part of the tested one. A version that it cannot look up is an error.
audit: ## compare the pinned versions with PyPI's advisories (needs the network)
	test -x $(AUDIT)/bin/pip-audit || \
		{ $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
		|| { echo "audit: not passed. If no advisory is named above, PyPI's data could not be reached;"; \
		echo "docs/security.md says what was known when it was written."; exit 1; }

format: $(STAMP) ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-tables: $(STAMP) ## write the key tables of docs/configuration.md from the schema
	$(BIN)/python tools/docs_tables.py

golden: $(STAMP) ## write the golden curve anew, after a change that is meant to change results
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden

clean: ## remove caches and build outputs; runs/ and .venv stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
