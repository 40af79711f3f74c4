# The two commands of the README, and the pieces that they are made of.

PYTHON ?= python3
# A version of JAX to test with, e.g. make clean test JAX=0.10.2; empty takes the newest that fits.
JAX ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

# The main job on the embedded digits: train, compress to a tenth... see experiments/mnist_autoencoder.py.
demo: $(VENV)/installed
	$(BIN)/python experiments/mnist_autoencoder.py --data embedded --name demo

test: $(VENV)/installed-test check

# What CI runs, in the environment that is there.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

bench: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable '.[zoo]'
	$(BIN)/python experiments/bench_convolutions.py
	$(BIN)/python experiments/bench_discovery.py
	$(BIN)/python experiments/bench_speed.py
	$(BIN)/python experiments/zoo.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[experiments]'
	touch $@

$(VENV)/installed-test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]' $(JAX:%='jax==%')
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) runs build *.egg-info
