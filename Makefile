# Everything that can be run here, on a machine with nothing set up but Python and make.
#
# Each target makes the virtual environment it needs on its first call, and again only when a requirement changes.
# VENV, PYTHON, CORES and PIP_FLAGS can be given: make demo PIP_FLAGS="--extra-index-url ..."

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_FLAGS ?=
# A test process takes about a gigabyte: more than 8 help no one.
CORES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
PYTEST_FLAGS ?=

PY := $(VENV)/bin/python
REQUIREMENTS := pyproject.toml $(CONSTRAINTS) hf_lifecycle/__init__.py
# One thread a process: as many test processes run as there are cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# tests/conftest.py says which process gets which test.
IN_PARALLEL := -n $(CORES)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all core lint types crash matrix docs pictures dist bench deepspeed gpu-dry-run notebooks clean
.DELETE_ON_ERROR:

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.has-demo ## train, kill, start again, compare: with and without the callback
	@$(PY) examples/mlm_demo/demo.py

test: $(VENV)/.has-test ## run all tests, fast ones first
	@$(ONE_THREAD) $(PY) -m pytest $(IN_PARALLEL) $(PYTEST_FLAGS)

test-all: $(VENV)/.has-test ## run all tests, and all of the large sets that make test takes a part of
	@$(ONE_THREAD) $(PY) -m pytest $(IN_PARALLEL) --exhaustive $(PYTEST_FLAGS)

core: $(VENV)/.has-test ## run the core of the exactness matrix (what .ci/run does with the oldest versions)
	@$(ONE_THREAD) $(PY) -m pytest tests -m core $(IN_PARALLEL) $(PYTEST_FLAGS)

lint: $(VENV)/.has-dev ## ruff, check and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(VENV)/.has-test $(VENV)/.has-dev ## mypy, strict
	@$(PY) -m mypy

crash: $(VENV)/.has-test ## kill a training at every file operation of its saves and at random times, 200 times
	@$(ONE_THREAD) $(PY) -m tests.crash.kill_training runs/crash --every 1 --random 180

matrix: $(VENV)/.has-test ## run the exactness matrix against stock Trainer too, and write docs/exactness.md
	@$(ONE_THREAD) $(PY) -m tests.resume.report
	@$(ONE_THREAD) $(PY) -m tests.resume.loops.table

docs: $(VENV)/.has-test ## build the site with the API reference into docs/_build
	@$(PY) -m sphinx -b html -W --keep-going -q docs docs/_build
	@echo docs/_build/index.html

pictures: $(VENV)/.has-test ## draw the pictures of README and docs, the timeline from a real run (a minute)
	@$(PY) docs/pictures/make.py

dist: ## build sdist and wheel, check them, and run README's first example from the wheel alone (a few minutes)
	@PIP_FLAGS="$(PIP_FLAGS)" $(PYTHON) .ci/dist.py

bench: $(VENV)/.has-demo ## measure what a step, a commit, a save and a resume cost (an hour; the machine must be idle)
	@for one in overhead commit stall resume; do echo "== $$one"; $(PY) benchmarks/$$one.py || exit 1; done

deepspeed: $(VENV)/.has-test ## install DeepSpeed, and run the tests that need it (five minutes)
	@DS_BUILD_OPS=0 $(PY) -m pip install --quiet --no-build-isolation deepspeed
	@$(ONE_THREAD) $(PY) -m pytest tests/distributed/test_sharded.py tests/distributed/test_deepspeed.py -k deepspeed

gpu-dry-run: $(VENV)/.has-test ## try tests/gpu/run.sh on the CPU, with tiny sizes (a minute)
	@$(ONE_THREAD) PYTHON=$(PY) tests/gpu/run.sh --dry-run

notebooks: $(VENV)/.has-test ## run the notebooks, and write them back with their outputs
	@$(ONE_THREAD) $(PY) notebooks/refresh.py

clean: ## remove the environments, runs and caches
	rm -rf $(VENV) .venv-oldest runs build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is kept only if its pip runs, so that one whose making was interrupted is made again from nothing.
$(VENV)/.has-%: $(REQUIREMENTS)
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing what '$*' needs into $(VENV), in the versions of $(CONSTRAINTS)"
	@$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c $(CONSTRAINTS) -e '.[$*]'
	@$(PY) -c 'import hf_lifecycle, torch, transformers'
	@touch $@
