# `make demo` and `make test` are all that a fresh machine needs: each makes the environments it uses.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help venv engines demo check format test test-long clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.stamp: pyproject.toml .ci/constraints/dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints/dev.txt --editable '.[dev]'
	touch $@

venv: .venv/.stamp

.venv-transformers/.stamp: .ci/engine-env .ci/constraints/transformers.txt
	PYTHON=$(PYTHON) .ci/engine-env transformers

.venv-vllm/.stamp: .ci/engine-env .ci/constraints/vllm.txt
	PYTHON=$(PYTHON) .ci/engine-env vllm

engines: .venv-transformers/.stamp .venv-vllm/.stamp ## the environments of the real engines (about 4 GB)

demo: .venv/.stamp .venv-transformers/.stamp ## five experts and a router on this machine, a dozen prompts, then down
	$(BIN)/python -m tests.demo

check: .venv/.stamp ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 -m 'not e2e and not long'

test: .venv/.stamp engines ## all that this machine can run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 -m 'not e2e and not long'
	$(BIN)/pytest -m 'e2e and not long'

test-long: test ## and what takes minutes
	$(BIN)/pytest -m long

format: .venv/.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environments; run directories stay
	rm -rf .venv .venv-transformers .venv-vllm build dist
