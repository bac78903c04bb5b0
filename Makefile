# The only way anything is run; hooks and CI call these targets too. `make` alone lists them.

BIN := .venv/bin

.PHONY: help setup serve test check format bench monitoring lock
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed  ## create .venv with everything pinned; instant when nothing changed
	@:

.venv/.installed: requirements.lock scripts/setup
	scripts/setup
	@touch $@

serve: setup  ## serve the shipped bundles on 127.0.0.1:8000
	$(BIN)/python -m service

test: setup  ## run every test; ARGS="-k purify" and the like go to pytest
	@scripts/servers
	$(BIN)/python -m pytest $(ARGS)

check: setup  ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layering.py

format: setup  ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: setup  ## run the benchmarks, each printing ratios measured in one run
	$(BIN)/python -m benchmarks

monitoring: setup  ## write Grafana's dashboards, and the rules as Kubernetes reads them
	$(BIN)/python -m monitoring.dashboards
	$(BIN)/python -m monitoring.prometheus_rule

lock: setup  ## pin what pyproject.toml asks for; ARGS=--upgrade takes the newest
	scripts/lock $(ARGS)
