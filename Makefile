# Everything runs in .venv. It is made when there is none; an existing one is only installed into.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
IN_CI := $(filter true,$(CI))
CONSTRAINTS := $(if $(IN_CI),$(wildcard .ci/constraints.txt))
# Tests run on one thread each, so a process per core halves the time of two cores.
PARALLEL := -n auto --maxprocesses 4
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(IN_CI),-qq) $(addprefix -c ,$(CONSTRAINTS))
# Prints where the outer Python has a torch and a torchvision that fit: they are seen from .venv, not installed again.
FITTING_TORCH := from importlib.metadata import distribution; \
  fits = lambda name, *least: tuple(map(int, distribution(name).version.split(".")[:2])) >= least; \
  print(distribution("torch").locate_file("") if fits("torch", 2, 14) and fits("torchvision", 0, 29) else "")

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## customise a handwriting model in front of your eyes
	$(BIN)/moe-zoo demo customization

test: $(VENV)/.installed-dev ## run all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed-dev ## run the tests that do not train
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: $(VENV)/.installed-dev ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-dev ## sort imports and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

wheel: $(VENV)/.installed-dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove caches and builds; the environment and runs/ stay
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache
	find zoo tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"MoE Zoo needs Python 3.11 or newer, found {sys.version.split()[0]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c '$(FITTING_TORCH)' 2>/dev/null > $(VENV)/outer-torch.pth || true
	@mv $(VENV)/outer-torch.pth "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
