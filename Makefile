# Commands for this checkout; `make` lists them.
# Variables: EXTRA=cpu|cuda  MODEL=path or name  ARGS="further flags"  PYTHON=python3.11  VENV=.venv
# LOCKED=1 recreates the environment from deploy/requirements-cpu.lock alone, hashes checked.

EXTRA ?= cpu
VENV ?= .venv
MODEL ?=
ARGS ?=
LOCKED ?=
# The first Python on the path that can run rtap; else python3, for which setup_env.py prints the error.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; exit; }; \
	done; echo python3)
SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV) $(if $(LOCKED),--locked)

.DEFAULT_GOAL := help
.PHONY: help setup lock sbom serve test test-all check bench stress train image-check ray-check clean

help: ## list the commands
	@echo "make COMMAND [EXTRA=cuda] [MODEL=...] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 15

setup: ## create .venv and install the server (EXTRA=cuda on CUDA machines)
	@$(SETUP) $(EXTRA)

lock: ## write deploy/requirements-cpu.lock for pyproject.toml (ARGS=--upgrade: the newest versions)
	@test -x $(VENV)/bin/python || $(SETUP) $(EXTRA) dev
	@$(VENV)/bin/python scripts/lock.py $(ARGS)

sbom: ## write build/sbom.json, versions and licences of all installed packages (CycloneDX)
	@$(SETUP) $(EXTRA) dev
	@$(PYTHON) -m venv build/cyclonedx && build/cyclonedx/bin/pip install -q cyclonedx-bom
	@build/cyclonedx/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-file build/sbom.json

serve: setup ## serve MODEL, or the bundled models, at http://127.0.0.1:8000
	@exec $(VENV)/bin/rtap serve $(MODEL) $(ARGS)

test: ## run the tests of a pull request, on real vLLM servers
	@$(SETUP) $(EXTRA) dev
	@$(VENV)/bin/python -m pytest --numprocesses 2 -m "not slow" $(ARGS)

test-all: ## run all tests, the slow ones included: page, other clients, training runs, faults
	@$(SETUP) $(EXTRA) dev
	@$(VENV)/bin/python -m pytest --numprocesses 2 $(ARGS)

check: ## check formatting, lint with bandit's rules, strict types, import layers, secrets in files
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports
	@git ls-files -z -- ':!*.lock' ':!*.safetensors' ':!deploy/models/*/manifest.json' ':!docs/results' ':!tests' | \
		xargs -0 $(VENV)/bin/detect-secrets-hook --exclude-secrets '^none$$'
	@git ls-files -z -- tests | xargs -0 $(VENV)/bin/detect-secrets-hook --disable-plugin KeywordDetector

bench: ## run parity, overhead, latency breakdown and rivals on the bundled models, then one report
	@$(SETUP) $(EXTRA) train
	$(VENV)/bin/python benchmarks/parity.py
	-$(VENV)/bin/python benchmarks/overhead.py # exits with 1 when a goal is missed
	$(VENV)/bin/python benchmarks/latency_breakdown.py
	$(VENV)/bin/python benchmarks/rivals.py
	$(VENV)/bin/python benchmarks/report.py

stress: ## fuzz for ten minutes, attack, overload, and soak with faults for 40 minutes
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/python -m tests.stress.fuzz
	-$(VENV)/bin/python -m tests.stress.abuse # exits with 1 when a bound is broken
	$(VENV)/bin/python -m tests.stress.overload
	$(VENV)/bin/python -m tests.stress.soak

train: ## train the bundled models (ARGS="--install", "--smoke"); `rtap train` has each stage
	@$(SETUP) $(EXTRA) train
	@exec $(VENV)/bin/rtap train pipeline $(ARGS)

image-check: ## build the Dockerfile without Docker and run its image locked down (root; buildah, debootstrap)
	@$(SETUP) $(EXTRA)
	$(VENV)/bin/python deploy/image/verify.py $(ARGS)

ray-check: ## start replicas on Ray and check keys, stickiness, kills, drain, throughput (docs/results/ray)
	@$(SETUP) $(EXTRA) train ray
	$(VENV)/bin/python -m deploy.ray.check $(ARGS)

clean: ## remove .venv, build/ and all caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
