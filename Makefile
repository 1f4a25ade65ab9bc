# `make demo` and `make test` are all that a fresh machine needs: each makes the environments it uses.
PYTHON ?= python3
BIN := .venv/bin
SCRIPTS = $(wildcard sbatch/* findings/*.sh) .ci/run .ci/engine-env .ci/client-env $(shell find hpc_router -name '*.sh')
.DEFAULT_GOAL := help
.PHONY: help venv engines demo check shellcheck format test test-long clean bench bench-peers .venv-transformers .venv-vllm \
  .venv-train .venv-bench-peers clients slurm-newest engines-newest

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.stamp: pyproject.toml .ci/constraints/dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints/dev.txt --editable '.[dev]'
	touch $@

venv: .venv/.stamp

.venv-transformers .venv-vllm .venv-train .venv-bench-peers: # the script sees for itself whether there is anything to do
	PYTHON=$(PYTHON) .ci/engine-env $(@:.venv-%=%)

engines: .venv-transformers .venv-vllm .venv-train ## the environments of the real engines (about 4 GB)

engines-newest: .venv/.stamp engines ## try other versions of the engines, and report what changes (20 minutes)
	$(BIN)/python -m tests.e2e.newest

clients: ## the clients that `make test-long` runs (2.5 GB)
	PYTHON=$(PYTHON) .ci/client-env

slurm-newest: .venv/.stamp # a root with the newest Slurm in the user's cache (460 MB); the tests say why where there is none
	$(BIN)/python -m tests.slurm.releases newest

bench-peers: .venv-bench-peers ## the routers from PyPI that `make bench` measures beside ours (100 MB)

bench: .venv/.stamp .venv-bench-peers ## what relaying costs, beside nginx, haproxy and other routers (15 minutes)
	$(BIN)/hpc-router bench router

demo: .venv/.stamp .venv-transformers ## five experts and a router on this machine, a dozen prompts, then down
	$(BIN)/python -m launch.demo

check: .venv/.stamp ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory shellcheck
	$(BIN)/pytest --numprocesses 2

shellcheck: # where it is installed; CI installs it
	@if command -v shellcheck >/dev/null; then \
	  shellcheck --shell=bash --external-sources --source-path=SCRIPTDIR $(SCRIPTS); \
	elif [ "$$CI" = true ]; then \
	  echo 'shellcheck is not installed' >&2; exit 1; \
	else \
	  echo 'shellcheck is not installed: the shell scripts were not checked'; \
	fi

test: .venv/.stamp engines slurm-newest ## all that this machine can run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory shellcheck
	$(BIN)/pytest --numprocesses 2
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m '(e2e or slurm) and not long'
	TEST_SLURM_RELEASE=newest $(BIN)/pytest tests/slurm --numprocesses 3 --dist loadfile --no-loadscope-reorder -m 'newest and not long'

test-long: test clients ## and what takes minutes
	$(BIN)/pytest -m long
	for release in trixie sid; do \
	  TEST_SLURM_RELEASE=$$release $(BIN)/pytest tests/slurm --numprocesses 2 --dist loadfile --no-loadscope-reorder -m slurm || exit 1; \
	done

format: .venv/.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environments; run directories stay
	rm -rf .venv .venv-transformers .venv-vllm .venv-train .venv-bench-peers .venv-clients .venv-instructor \
	  tests/clients/npm/node_modules build dist
