# Everything below runs in .venv, which `make setup` makes. PYTHON names another interpreter (3.11 or newer).

PYTHON ?= python3
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check
BIN := .venv/bin
STAMP := .venv/.selfnpo

.PHONY: setup demo report test test-slow lint clean

setup: $(STAMP)

# torch first and by exact version: a range can pull a second, larger build; torch then serves DeepSpeed's own build.
$(STAMP): pyproject.toml setup.py
	@echo "setup: torch, triton, then selfnpo_fast and its dependencies, into .venv (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel torch==2.13.0
	@$(PIP) triton==3.7.1
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

demo: setup
	@$(BIN)/selfnpo train --config configs/digits.yaml --output runs/demo --overwrite
	@$(BIN)/selfnpo evaluate --negative runs/demo/negative --brief --output runs/demo_report

report: setup
	@test -d runs/demo/negative || $(BIN)/selfnpo train --config configs/digits.yaml --output runs/demo --overwrite
	@$(BIN)/selfnpo evaluate --negative runs/demo/negative --full --output runs/report

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-slow: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .

# Leaves runs/ and build/digits (trained models) alone.
clean:
	rm -rf .venv build/lib build/bdist.* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
