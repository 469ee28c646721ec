# Everything below runs in .venv, which `make setup` makes. PYTHON names another interpreter (3.11 or newer).
# `make test-gpu BIN=FOLDER` makes nothing: it runs this checkout on the PYTHONPATH with FOLDER/python.

PYTHON ?= python3
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
BIN := .venv/bin
STAMP := .venv/.selfnpo

.PHONY: setup demo report test test-slow test-gpu lint clean

setup: $(STAMP)

# torch first and by exact version: a range can pull a second, larger build; torch then serves our C++ extension and
# DeepSpeed's own build.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cpu/kernels/*.*)
	@echo "setup: torch, triton, then selfnpo_fast and its dependencies, into .venv (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel ninja torch==2.13.0
	@$(PIP) triton==3.7.1
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

demo: setup
	@$(BIN)/selfnpo train --config configs/digits.yaml --output runs/demo --overwrite
	@$(BIN)/selfnpo evaluate --negative runs/demo/negative --brief --output runs/demo_report

# Trains and draws what benchmarks/results/digits.json lacks; hours from nothing (FRESH=1), and it can be interrupted.
report: setup
	@$(BIN)/python -m benchmarks.digits_report.report $(if $(FRESH),--fresh)

# Two processes of one thread each. Each starts with half of the files, and takes tests from the other when it is done;
# WORKERS=0 runs all tests in this process.
WORKERS ?= 2
GPU_WORKERS ?= 14
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

# On a machine with a GPU. tests/ops compiles 2,000 kernels there, in GPU_WORKERS processes that share Triton's cache;
# `-m gpu_core` has the 630 that matter most. Tests that need a GPU say so when they are skipped; the benchmarks fail
# without. A checkout that is not installed has no C++ extension, and leaves out the tests that are about it.
ifeq ($(origin BIN),command line)
test-gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
test-gpu: WITHOUT_CPP := -k "not cpp" --ignore=tests/ops/test_dispatch.py
else
test-gpu: setup
endif
test-gpu:
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(GPU_WORKERS) --dist worksteal tests/ops $(WITHOUT_CPP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run --device cuda

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Leaves runs/ and build/digits (trained models) alone.
clean:
	rm -rf .venv build/lib build/bdist.* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
