PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test lint gpu-check clean

demo: $(VENV)/installed  ## a prompt, a canvas that settles, text
	$(BIN)/dgemma generate --watch --stats --canvas-length 64 --seed 4 "Tell me a short story about a fox named Pip who looks for a golden key in the forest"

test: $(VENV)/installed-test  ## the whole suite
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check:  ## on a machine with a GPU: every kernel checked, every figure taken; nothing is installed
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py $(SECTIONS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(BUILT_FROM)
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python $(BUILT_FROM)
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV)
