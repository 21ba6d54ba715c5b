# The two commands of the README are `make demo` and `make test`; both set everything up first.
PYTHON ?= python3
OUT ?= out/demo
JOBS ?= 2
SHARED := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1

.PHONY: help setup demo demo-full test test-slurm test-page test-long docs lint format clean

help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(VENV)/.ready  ## the virtual environment, with pinned versions

$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FlowMask needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: setup      ## dataset -> cache -> decoder -> DiT -> J&F -> predict, in about ten minutes on 2 cores
	$(BIN)/flowmask demo --out $(OUT)

demo-full: setup ## the same at length, up to an hour on 2 cores
	$(BIN)/flowmask demo --full --out $(OUT)-full

test: setup      ## every law once, small; JOBS=N processes, 2 unless said
	$(BIN)/pytest -m 'not long' $(SHARED)

test-slurm: setup ## the laws of launching on a real SLURM; installs its packages when root
	tests/slurm/install.sh
	FLOWMASK_NEED_SLURM=1 $(BIN)/pytest --timeout 3600 tests/slurm

test-page: setup ## the laws of the page in a real browser; installs it when root
	tests/launch/serve/install.sh
	FLOWMASK_NEED_BROWSER=1 $(BIN)/pytest tests/launch/serve

test-long: setup ## the same laws at length; TRIALS=N SEED=S JOBS=N
	$(BIN)/pytest --timeout 3600 $(SHARED)

docs: setup      ## the site in site/, from docs/; a dead link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup    ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## forget the environment and every output of the demo
	rm -rf $(VENV) out *.egg-info
