# One command for each thing a person does with this checkout. `make` alone lists them.
# Variables: EXTRA=cpu|cuda  MODEL=path or name  ARGS="further flags"  PYTHON=python3.11  VENV=.venv
# LOCKED=1 makes the environment anew from deploy/requirements-cpu.lock alone, hashes checked.

EXTRA ?= cpu
VENV ?= .venv
MODEL ?=
ARGS ?=
LOCKED ?=
# The first Python on the path that can run rtap; python3 if none can, so that setup_env.py says what is wrong.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; exit; }; \
	done; echo python3)
SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV) $(if $(LOCKED),--locked)

.DEFAULT_GOAL := help
.PHONY: help setup lock sbom serve test check bench bench-check overload soak fuzz train prove-image ray-check clean

help: ## list the commands
	@echo "make COMMAND [EXTRA=cuda] [MODEL=...] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 15

setup: ## create .venv and install what serving needs (EXTRA=cuda on CUDA machines)
	@$(SETUP) $(EXTRA)

lock: ## write deploy/requirements-cpu.lock for pyproject.toml as it is (ARGS=--upgrade: the newest versions)
	@test -x $(VENV)/bin/python || $(SETUP) $(EXTRA) dev
	@$(VENV)/bin/python scripts/lock.py $(ARGS)

sbom: ## list what is installed, with versions and licences, in build/sbom.json (CycloneDX)
	@$(SETUP) $(EXTRA) dev
	@$(PYTHON) -m venv build/cyclonedx && build/cyclonedx/bin/pip install -q cyclonedx-bom
	@build/cyclonedx/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --output-file build/sbom.json

serve: setup ## install if needed, then serve MODEL, or the bundled models, at http://127.0.0.1:8000
	@exec $(VENV)/bin/rtap serve $(MODEL) $(ARGS)

test: ## install what tests need, then run them all, the real vLLM included
	@$(SETUP) $(EXTRA) dev
	@$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

check: ## formatting, lint with bandit's rules, strict types, import directions, keys left in files
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports
	@git ls-files -z -- ':!*.lock' ':!*.safetensors' ':!deploy/models/*/manifest.json' ':!docs/results' ':!tests' | \
		xargs -0 $(VENV)/bin/detect-secrets-hook --exclude-secrets '^none$$'
	@git ls-files -z -- tests | xargs -0 $(VENV)/bin/detect-secrets-hook --disable-plugin KeywordDetector

bench: ## on the bundled models: parity, overhead, cycles begun ahead, where the time goes, rivals, `rtap eval ARGS`
	@$(SETUP) $(EXTRA) train
	$(VENV)/bin/python scripts/bench_parity.py
	-$(VENV)/bin/python scripts/bench_overhead.py # ends with 1 where a goal is missed
	$(VENV)/bin/python scripts/bench_where.py
	$(VENV)/bin/python scripts/bench_rivals.py
	$(VENV)/bin/python scripts/bench_report.py
	$(VENV)/bin/rtap eval $(ARGS)

bench-check: ## measure the committed ratios again, shorter, and fail where one has become worse
	@$(SETUP) $(EXTRA) train
	$(VENV)/bin/python scripts/bench_check.py $(ARGS)

train: ## train the bundled models from nothing (ARGS="--install", "--smoke"); `rtap train` has each stage
	@$(SETUP) $(EXTRA) train
	@exec $(VENV)/bin/rtap train pipeline $(ARGS)

prove-image: ## build the Dockerfile without Docker and run its image locked down (root; buildah, debootstrap)
	@$(SETUP) $(EXTRA)
	$(VENV)/bin/python scripts/prove_image.py $(ARGS)

ray-check: ## replicas on a Ray of its own: keys, stickiness, kills, drain, throughput (docs/results/ray)
	@$(SETUP) $(EXTRA) train ray
	$(VENV)/bin/python scripts/check_ray.py $(ARGS)

overload: ## offer five times what the server can do (docs/results/overload.md)
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/python scripts/bench_overload.py $(ARGS)

soak: ## mixed traffic with faults for 40 minutes, memory and counters watched (ARGS="--minutes 10")
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/python scripts/soak.py $(ARGS)

fuzz: ## ten minutes of requests that /openapi.json allows, and that it does not (ARGS="--minutes 60")
	@$(SETUP) $(EXTRA) dev
	$(VENV)/bin/python scripts/fuzz.py $(ARGS)

clean: ## remove .venv and every cache that the commands above write
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
