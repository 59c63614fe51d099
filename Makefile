# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help sim test check lint bench soak wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "maveriq needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $@

sim: $(STAMP) ## replay the Azure code trace on eight simulated A6000 under MaverIQ
	$(BIN)/maveriq sim $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## format, style, types, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint wheel test ## all that CI runs

wheel: $(STAMP) ## build the wheel and run it in an empty environment
	$(BIN)/python scripts/check_wheel.py

bench: $(STAMP) ## measure speed and memory; prints ratios taken in one run
	$(BIN)/python benchmarks/run.py $(ARGS)

soak: $(STAMP) ## 10,000 simulated runs of the executor under random faults
	$(BIN)/python scripts/soak.py $(ARGS)

clean: ## remove the environment and everything built
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis runs
