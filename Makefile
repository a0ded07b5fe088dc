# Two commands: `make train` (install, then the main job) and `make test` (install, then every test).
# PYTHON=python3.12 picks another interpreter; TORCH_INDEX=URL takes torch from another wheel index.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt DS_BUILD_OPS=0 \
       $(BIN)/python -m pip install --quiet --disable-pip-version-check
SETUP := pyproject.toml setup.py constraints.txt

.PHONY: train test test-all lint format install dev clean

train: install
	$(BIN)/wastenot train configs/quickstart.yaml

test: dev
	$(BIN)/python -m pytest tests

# The same tests over exhaustive grids.
test-all: dev
	WASTENOT_GRID=full $(BIN)/python -m pytest tests

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# torch goes first and alone, so that nothing else decides which build of it arrives.
$(VENV)/.installed: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e '.[viz]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[viz,hf,mpi,bench,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
