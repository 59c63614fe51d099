# Everything runs in .venv, which the first target that needs it makes; who only simulates gets no tools and no torch.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PACKAGE := .venv/.package
TOOLS := .venv/.tools
# The tests start hundreds of Python processes. Without files of bytecode, each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
SITE_TOOLS := .venv/.site-tools

.DEFAULT_GOAL := help
.PHONY: help sim test test-heavy test-all check lint bench soak wheel docs audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PACKAGE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "maveriq needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) --editable .
	@touch $@

$(TOOLS): $(PACKAGE)
	$(PIP) --group dev
	@touch $@

sim: $(PACKAGE) ## replay the Azure code trace on eight simulated A6000 under MaverIQ
	$(BIN)/maveriq sim $(ARGS)

# Processes that share the tests; 0 runs them in one process.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(TOOLS) ## run the tests but the heavy ones, on all cores
	$(PYTEST) -m "not heavy" $(ARGS)

test-heavy: $(TOOLS) ## run the heavy tests alone
	$(PYTEST) -m heavy $(ARGS)

test-all: test test-heavy ## run all tests

lint: $(TOOLS) ## format, style, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint wheel docs test-all ## lint, wheel, site and all tests: what CI runs

wheel: $(TOOLS) ## build the wheel and run it in an empty environment
	$(BIN)/python scripts/check_wheel.py

$(SITE_TOOLS): $(PACKAGE)
	@$(PIP) --group docs
	@touch $@

docs: $(SITE_TOOLS) ## build the site of docs/ into site/ (python -m http.server -d site); a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: $(TOOLS) ## measure speed and memory; prints ratios taken in one run
	$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(TOOLS) ## random search: 10,000 simulated runs under faults, then the laws on random examples
	$(BIN)/python scripts/soak.py $(ARGS)

audit: $(PACKAGE) ## look up known vulnerabilities of the installed packages; needs the network, so CI does not run it
	$(PIP) --group audit
	$(BIN)/python scripts/audit.py

clean: ## remove the environment and everything built
	rm -rf .venv dist build site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis runs
