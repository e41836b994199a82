# Every target sets itself up: it needs python3 (>= 3.10) with venv, make, and a package index. Nothing is activated.
#   make test VENV=/path/to/venv      use (or create) another environment
#   make test PYTHON=python3.12       create the environment with another interpreter
#   make test TORCH=                  do not install torch first (keep what the environment has)
#   make test ARGS="-k cli -x"        further arguments for pytest (or for `moetion demo`, or the benchmarks)

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-versions test-slurm test-ray check bench papers gpu docs clean setup

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 3
VERSIONS ?= lowest middle newest
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.moetion-test-stamp
DEV_STAMP := $(VENV)/.moetion-dev-stamp
RAY_STAMP := $(VENV)/.moetion-ray-stamp
BENCH_STAMP := $(VENV)/.moetion-bench-stamp
DOCS_STAMP := $(VENV)/.moetion-docs-stamp
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
# The exact versions need Python 3.11; an older interpreter takes what the lower bounds give.
CONSTRAIN = $(shell $(PY) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
# The tests start many interpreters: what one has compiled the others read, also where the environment says otherwise.
unexport PYTHONDONTWRITEBYTECODE

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sort | awk 'BEGIN {FS = ":.*?## "} {printf "  make %-10s %s\n", $$1, $$2}'

demo: $(STAMP)  ## Train a small MoE, kill it, watch it come back bit for bit
	@$(PY) -m moetion_lightning demo $(ARGS)

test: $(DOCS_STAMP)  ## Run all tests
	$(PY) -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(ARGS)

test-versions: $(STAMP)  ## The tests that depend on versions, in three environments (uv; gigabytes): VERSIONS="lowest newest"
	$(PIP) uv
	@failed=0; for name in $(VERSIONS); do echo "== $$name"; $(PY) tests/versions.py $$name $(ARGS) || failed=1; done; exit $$failed

test-slurm: export MOETION_TEST_CLUSTERS = 1
test-slurm: $(STAMP)  ## Test on a SLURM cluster of this machine (root, and Debian's slurmctld slurmd slurm-client munge)
	$(PY) -m pytest tests/clusters/test_slurm.py -ra $(ARGS)

test-ray: $(RAY_STAMP)  ## Test on a Ray cluster of this machine; installs ray into the environment
	$(PY) -m pytest tests/clusters/test_ray.py -ra $(ARGS)

check: $(DEV_STAMP)  ## Lint, type check, fast tests (a few minutes)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n $(WORKERS) -q -m "not slow" tests/unit $(ARGS)

bench: $(BENCH_STAMP)  ## Measure overhead, recovery, replicas, failover; tables go to benchmarks/results/
	@set -e; found=0; for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || continue; case "$$script" in */_*|*/gpu.py) continue;; esac; \
	  found=1; echo "== $$script"; $(PY) "$$script" $(ARGS); done; \
	[ "$$found" = 1 ] || { echo "no benchmark scripts in benchmarks/"; exit 1; }

papers: $(STAMP)  ## Tables and figures of MoEvement and MoC-System, theirs beside ours (minutes)
	@set -e; for script in benchmarks/papers/[!_]*.py; do echo "== $$script"; $(PY) "$$script"; done

gpu: $(BENCH_STAMP)  ## On a machine with a GPU: run tests/gpu, measure, write benchmarks/results/gpu.md
	@$(PY) benchmarks/gpu.py $(ARGS)

docs: $(DOCS_STAMP)  ## Build the documentation into site/ (no network); every warning is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

setup: $(STAMP)  ## Only create the environment

clean:  ## Remove caches and build outputs (keeps the environment)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs
	find . -path './.venv*' -prune -o -path ./.git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python >= 3.10 or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is older than Python 3.10; set PYTHON= to a newer one"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: '$(PYTHON) -m venv' is unavailable; install it (Debian/Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) $(CONSTRAIN) -e '.[test]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) $(CONSTRAIN) -e '.[test,dev]'
	@touch $@

$(RAY_STAMP): $(STAMP)
	$(PIP) $(CONSTRAIN) -e '.[test,ray]'
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) $(CONSTRAIN) -e '.[test,bench]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) $(CONSTRAIN) -e '.[test,docs]'
	@touch $@
