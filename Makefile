# `make demo` and `make test` are the two commands of the README; both run the setup first.
PYTHON ?= python3
OUT ?= out/demo
JOBS ?= 3
SHARED := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
unexport PYTHONDONTWRITEBYTECODE  # each of many processes would compile all sources again

.PHONY: help setup demo demo-full test test-slurm test-page test-long docs lint format clean

help:            ## this list of targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(VENV)/.ready  ## make the virtual environment with pinned versions

$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FlowMask needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	# Not compiled: of 60,000 files few are imported, and each is then compiled once.
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: setup      ## dataset -> cache -> decoder -> DiT -> J&F -> predict, in 10 to 25 minutes on 2 cores
	$(BIN)/flowmask demo --out $(OUT)

demo-full: setup ## the long form of the demo, up to an hour on 2 cores
	$(BIN)/flowmask demo --full --out $(OUT)-full

test: setup      ## run every short test once; JOBS=N processes, default 3: some only wait
	$(BIN)/pytest -m 'not long' $(SHARED)

test-slurm: setup ## the tests of launching on a real SLURM; root installs its packages
	tests/slurm/install.sh
	FLOWMASK_NEED_SLURM=1 $(BIN)/pytest --timeout 3600 tests/slurm

test-page: setup ## the tests of the page in a real browser; root installs it
	tests/launch/serve/install.sh
	FLOWMASK_NEED_BROWSER=1 $(BIN)/pytest tests/launch/serve

test-long: setup ## the laws at length: long tests and drawn cases; TRIALS=N SEED=S JOBS=N
	$(BIN)/pytest -m 'long or drawn' --timeout 3600 $(SHARED)

docs: setup      ## build docs/ into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup      ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup    ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## delete the environment and every output of the demo
	rm -rf $(VENV) out *.egg-info
