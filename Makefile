# Everything starts here; needs only Python 3.11 to 3.13 with pip.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) and print("$(name)")' 2>/dev/null)))
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup search test dashboard bench clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv and install everything into it

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make setup PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test]'
	@touch $@

search: setup  ## search on the embedded data: at most 10 minutes on two cores, no network
	$(BIN)/paredown search scripts/configs/digits.yaml

test: setup  ## lint, types, layers, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile

dashboard: setup  ## look at the studies in a browser, on this machine only
	$(BIN)/paredown dashboard

STUDY ?= digits
bench: setup  ## a finished study beside its peers, timed in one run, into runs/STUDY: make bench STUDY=NAME
	$(BIN)/paredown benchmark peers --study $(STUDY) --quick --output runs/$(STUDY)

clean:  ## remove .venv and caches; studies in runs/ stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find search spaces evaluators tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
