# Every target builds .venv by itself. `make help` lists them.

# Python 3.11 to 3.13.
PYTHON ?= python3
# Installed first and on its own, so that a local or CPU-only wheel is taken where pip knows one. For another build, while
# there is no .venv yet: make run TORCH='torch --extra-index-url https://download.pytorch.org/whl/cu128'
TORCH ?= torch==2.13.0
WORKLOAD ?= dsocr-standard-v1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := $(VENV)/.ready
CONSTRAINTS := $(VENV)/constraints.txt
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: run test lint docs bench nsys clean help

run: $(READY) ## trace the standard workload on the best device present, print the summary and the report's path
	$(BIN)/dsocr-trace run --workload $(WORKLOAD)

test: lint ## lint, then every test; those of Nsight Systems run where it is here or can be had
	$(BIN)/python -m dsocr_trace.machine.install_nsys --optional
	$(BIN)/pytest

lint: $(READY) ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY) ## the documentation site, into site/
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(READY) ## every benchmark
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

nsys: $(READY) ## Debian's Nsight Systems, into .nsight/, unless there is one; needs no root
	$(BIN)/python -m dsocr_trace.machine.install_nsys

clean: ## remove caches and built files; .venv, .nsight and results/ stay
	rm -rf site dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(wildcard analytic hooks stage_runners dsocr_trace tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Dependency groups need pip 25.1.
	$(PIP) install --upgrade 'pip>=25.1'
	@# TORCH alone decides on torch.
	grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
	$(PIP) install --constraint $(CONSTRAINTS) $(TORCH)
	$(PIP) install --constraint $(CONSTRAINTS) --editable . --group dev --group docs
	touch $@
