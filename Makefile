# make demo        install what running needs, train the demo (minutes on 2 cores), print base vs trained
# make test        lint, then every test that is not marked slow or stress; PYTEST_ARGS='-k spans' narrows it
# make test-fast   the tests of plain logic: no torch, no training, about a minute
# make test-slow   the tests marked slow
# make test-stress the tests marked stress: kills, hundreds of steps, a whole study; before a release
# make test-compilers  what the compilers of an H100 and a v5e make of a 3B run, judged by gates; no card is needed
# make vllm        install vLLM for CPUs into .venv-vllm, 3 GB: Linux, x86-64, python3.11
# make test-vllm   rollouts by real vLLM servers on this machine: minutes; the other targets leave these tests out
# make test-matrix the fast tests and two training steps on every Python and jax that constraints/ has a lock of
# make docs        the documentation's site, in site/; a warning fails
# make lint        ruff, and pyrefly over vigos_jax/ and configs/
# make clean       remove .venv, .venv-vllm, caches and build outputs; runs/ stays

SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
VLLM := .venv-vllm
# The lock of the Python in the venv: constraints/py311-jax0.10.txt for 3.11.
LOCK ?= $$($(PYTHON) -c 'import glob, sys; print(*glob.glob("constraints/py%d%d-*.txt" % sys.version_info[:2]))')
PIP = $(PYTHON) -m pip --quiet --disable-pip-version-check install -c $(LOCK)
PYTEST := JAX_PLATFORMS=cpu $(PYTHON) -m pytest -q -n 2 --dist loadfile
PYTEST_ARGS ?=
# What compiles little and needs neither torch nor the optional packages; a new file in a folder is taken along.
FAST := tests/grading tests/report tests/rollouts/test_parse.py tests/test_house.py tests/test_config.py \
  tests/data/test_sources.py tests/data/test_grouping.py \
  $(addprefix tests/method/test_,spans.py prompts.py roles.py)

# Judged by compilers alone, without a clock; and the tests that skip where the GPU's compiler is not installed.
GATES := decode_bytes_h100 decode_kernels_h100 decode_bytes_v5e decode_bytes_qwen3_5_h100 logits_h100 logits_v5e \
  memory_7b_h100 memory_3b_v5e
COMPILED := tests/plan/test_gpu.py tests/models/test_attention_compiled.py

.PHONY: demo test test-fast test-slow test-stress test-compilers vllm test-vllm test-matrix lint clean

demo: $(VENV)/installed
	$(PYTHON) -m vigos_jax.main --config configs/demo_reasoning.py

test: lint $(VENV)/installed-test
	$(PYTEST) -m 'not slow and not stress' $(PYTEST_ARGS)

test-fast: $(VENV)/installed-core
	$(PYTEST) -m 'not slow and not stress' $(FAST) $(PYTEST_ARGS)

test-matrix:
	@tests/matrix.sh

# pytest exits 5 when nothing was selected: that is not a failure.
test-slow: $(VENV)/installed-test
	@$(PYTEST) -m slow --ignore=tests/vllm_server $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 5 ] && echo 'no slow tests'; }

test-stress: $(VENV)/installed-test
	$(PYTEST) -m stress $(PYTEST_ARGS)

test-compilers: $(VENV)/installed-compilers
	JAX_PLATFORMS=cpu $(PYTHON) -m benchmarks --only $(GATES)
	$(PYTEST) $(COMPILED)

vllm: $(VLLM)/installed

# One process: a server has both cores.
test-vllm: $(VENV)/installed-test $(VLLM)/installed
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -q tests/vllm_server $(PYTEST_ARGS)

lint: $(VENV)/installed-core
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check --quiet .
	$(PYTHON) -m pyrefly check --python-interpreter-path $(PYTHON) --progress-bar no

# The stamps hold no text: their dates say when the venv last agreed with setup.py and the locks.
$(VENV)/installed: setup.py $(wildcard constraints/*.txt)
	@test -x $(PYTHON) || { \
	  for python in python3.11 python3.12 python3.13 python3; do \
	    $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	      && exec $$python -m venv $(VENV); \
	  done; \
	  echo 'make: no Python 3.11, 3.12 or 3.13 with venv on the PATH' >&2; exit 1; }
	@echo 'installing into $(VENV)'
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-core: $(VENV)/installed
	@$(PIP) -e '.[test-core]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed-core
	@echo 'installing what the tests need into $(VENV)'
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/installed-compilers: $(VENV)/installed-test
	@echo 'installing the compiler for GPUs into $(VENV)'
	@$(PIP) -e '.[plan-gpu]'
	@touch $@

$(VLLM)/installed: $(addprefix tests/vllm_server/,install.sh requirements.txt vllm.txt torchvision_operators.py)
	@echo 'installing vLLM into $(VLLM)'
	@tests/vllm_server/install.sh $(VLLM)

clean:
	rm -rf $(VENV) $(VLLM) .venv-matrix build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf site

# Not --quiet: warnings would pass.
.PHONY: docs
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(PYTHON) -m mkdocs build --strict
	@echo 'site/index.html'

$(VENV)/installed-docs: $(VENV)/installed
	@$(PIP) -e '.[docs]'
	@touch $@
