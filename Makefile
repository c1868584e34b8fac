# `make` prints what there is. Everything runs in $(VENV), which the first target that needs it creates.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small networks are as fast on one thread, and do not choke on a busy machine; tests run side by side instead.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: help install quickstart matrix test test-fast fuzz lint type format notebooks docs docs-serve bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | \
		while IFS=$$'\t' read -r target text; do printf '  make %-11s %s\n' "$$target" "$$text"; done

install: $(STAMP) ## create .venv and install everything into it (once, and again when the requirements change)

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		python="$${PYTHON:-}"; \
		for candidate in python3 python3.13 python3.12 python3.11; do \
			[ -n "$$python" ] && break; \
			$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
				&& python=$$candidate || true; \
		done; \
		if [ -z "$$python" ]; then \
			echo "Python 3.11, 3.12 or 3.13 is needed, found: $$(python3 --version 2>&1 || true)." >&2; \
			echo "Install one of them, or say where it is: make PYTHON=/path/to/python3.12 install" >&2; \
			exit 1; \
		fi; \
		$$python -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(VENV) holds $$($(BIN)/python --version); Python 3.11 to 3.13 is needed: rm -r $(VENV) and make again" >&2; exit 1; }
	@echo "Installing into $(VENV); PyTorch is large, the first time takes minutes."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

quickstart: $(STAMP) ## two networks x (dense, half, a quarter of the MACs) on digits, and a table (minutes)
	OMP_NUM_THREADS=1 $(BIN)/lightning-compress sweep=quickstart

matrix: $(STAMP) ## every scheme on every type of network, on digits, and a table (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix.py

test: $(STAMP) ## everything that must hold before a change goes in: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test-fast: $(STAMP) ## what neither trains nor starts processes, until the first failure (minutes)
	$(PYTEST) -m "not slow and not long" -x -q

fuzz: $(STAMP) ## the property tests on examples that nobody has seen yet
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) -m "hypothesis and not slow"

lint: $(STAMP) ## ruff: style and docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

format: $(STAMP) ## ruff: rewrite what can be rewritten
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP) ## run every notebook from top to bottom
	$(PYTEST) --nbmake notebooks

docs: $(STAMP) ## build the documentation into site/; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

docs-serve: $(STAMP) ## the documentation at http://127.0.0.1:8000, anew at each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(STAMP) ## the benchmarks beside their peers, in their short form
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/without-dependencies.txt
	@for benchmark in coverage overhead distillation training_free pruning quantization matrix; do \
		echo "== $$benchmark"; $(BIN)/python benchmarks/$$benchmark.py --quick; done

clean: ## remove what was built or cached; results in outputs/ and .venv stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf
