# make demo        install what running needs, train the demo (minutes on 2 cores), print base vs trained
# make test        lint, then every test that is not marked slow; PYTEST_ARGS='-k spans' narrows it
# make test-slow   the tests marked slow
# make lint        ruff only
# make clean       remove .venv, caches and build outputs; runs/ stays

SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --quiet --disable-pip-version-check install -c constraints.txt
PYTEST := JAX_PLATFORMS=cpu $(PYTHON) -m pytest -q -n 2 --dist loadfile
PYTEST_ARGS ?=

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(PYTHON) -m vigos_jax.main --config configs/base.py

test: lint
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

# pytest exits 5 when nothing was selected: no slow test is no failure.
test-slow: $(VENV)/installed-test
	@$(PYTEST) -m slow $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 5 ] && echo 'no slow tests'; }

lint: $(VENV)/installed-test
	$(PYTHON) -m ruff check .

# The stamps hold no text: their dates say when the venv last agreed with setup.py and constraints.txt.
$(VENV)/installed: setup.py constraints.txt
	@test -x $(PYTHON) || { \
	  for python in python3.11 python3; do \
	    $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	      && exec $$python -m venv $(VENV); \
	  done; \
	  echo 'make: no python3.11 (or python3 of version 3.11 or 3.12) with venv on the PATH' >&2; exit 1; }
	@echo 'installing into $(VENV)'
	@$(PIP) -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo 'installing what the tests need into $(VENV)'
	@$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
