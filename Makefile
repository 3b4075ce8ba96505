PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the package, its extras and the tools

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## train four small experts, merge them by five methods, compare (about ten seconds)
	$(BIN)/python examples/digits/demo.py

test: setup  ## run all tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup  ## measure speed and memory
	$(BIN)/python benchmarks/run.py

docs: setup  ## write the generated pages and pictures anew
	$(BIN)/python docs/generate.py
	$(BIN)/python examples/digits/demo.py
	$(BIN)/python docs/pictures.py demo_output

clean:  ## remove what the targets make, .venv included
	rm -rf $(VENV) demo_output build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
