# Two commands on a fresh machine: `make demo` and `make test`. Each does its own set-up, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench bench-cuda clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# The stamp is newer than what it was made from: a second call installs nothing.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,tensorboard,sweep]'
	touch $@

setup: $(VENV)/.ready

demo: setup  ## fine-tune SmolLM2-135M to document Python functions, before/after table; ARGS="quant=nf4" for QLoRA
	$(BIN)/python train.py experiment=demo $(ARGS)

lint: setup  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test test-all: export HF_HUB_OFFLINE = 1

test: lint  ## set-up, lint, types and the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not cuda"

test-all: lint  ## every test that this machine can run
	$(BIN)/python -m pytest -m "not cuda"

bench: setup  ## the CPU figures of benchmarks/README.md; ARGS="--write" renews it, ARGS="peers saved" measures some
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-cuda: setup  ## the same on a GPU, eight minutes a call: repeat it until nothing is left; ARGS=7b-peft for one piece
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]' trl liger-kernel
	$(BIN)/python benchmarks/bench.py --cuda $(ARGS)

clean:  ## remove the environment, build output and caches in the checkout (the model cache and outputs/ stay)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
