# Everything runs in .venv. It is made when there is none; an existing one is only installed into.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(filter true,$(CI)),$(wildcard .ci/constraints.txt))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# A torch and torchvision that the outer Python already has, and that fit, are seen from inside instead of installed again.
FITTING_TORCH := from importlib.metadata import version; \
  at_least = lambda name, *wanted: tuple(int(part) for part in version(name).split(".")[:2]) >= wanted; \
  print("--system-site-packages" if at_least("torch", 2, 14) and at_least("torchvision", 0, 29) else "")

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## customise a handwriting model in front of your eyes
	$(BIN)/moe-zoo demo customization

test: $(VENV)/.installed-dev ## run all tests
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev ## run the tests that do not train
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.installed-dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed-dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove caches and builds; the environment and runs/ stay
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache
	find zoo tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"MoE Zoo needs Python 3.11 or newer, found {sys.version.split()[0]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $$($(PYTHON) -c '$(FITTING_TORCH)' 2>/dev/null) $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed
