# The whole project from a fresh clone; every target first builds .venv if it is missing or out of date.
#
#   make demo               RLHF end to end on a real model       make demo SIZE=tiny     the same steps in a minute
#   make test               lint, types, tests, the tiny demo     make lint, make unit    parts of it
#   make bench              measurements beside peers             make bench QUICK=1      to see that they work
#   make results            the demo at three seeds               make clean              remove what make made
#
# Another interpreter: make PYTHON=python3.12 demo        More options for the demo: make demo ARGS="--resume"

PYTHON ?= python3
SIZE   ?= full
QUICK  ?=
ARGS   ?=

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN         := .venv/bin
INSTALLED   := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit demo-tiny bench results clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)' here. TokenMDP needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "TokenMDP needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv: a few minutes, once."
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]' | { grep --line-buffered -E '^ *Downloading' || true; }
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # what pip would do on one core; some packages ship templates
	@touch $@

demo: $(INSTALLED)
	$(BIN)/tokenmdp demo --size $(SIZE) $(ARGS)

test: $(INSTALLED)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory demo-tiny

lint: $(INSTALLED)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto  # one thread a process, one process a core

demo-tiny: $(INSTALLED)
	$(BIN)/tokenmdp demo --size tiny --out runs/demo-tiny --overwrite

bench: $(INSTALLED)
	@mkdir -p runs/bench
	for name in rollout learner; do $(BIN)/python bench/$$name.py $(if $(QUICK),--quick --json runs/bench,--json docs/results)/$$name.json; done

results: $(INSTALLED)
	$(BIN)/python bench/demo.py --seeds 0 1 2 --json docs/results/demo.json

clean:
	rm -rf .venv build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis runs/bench runs/demo-tiny
	find src tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
