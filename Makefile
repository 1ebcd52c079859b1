# Everything a fresh machine needs: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACKING := sqlite:///$(CURDIR)/mlflow.db

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-slow fuzz kill-points lint bench findings real-model ui clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## Create .venv and install the project with its pinned dependencies

# torch goes first and alone: its version is the one thing that decides whether CUDA is fetched.
# TORCH_INDEX=https://... names another index for it (PyTorch's CPU index, say).
$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	# Oracle of the curvature tests; one of its unused dependencies would replace torch.
	-$(BIN)/python -m pip install --quiet --no-deps \
	    curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 \
	    linear_operator==0.6.1 opt_einsum==3.4.0
	touch $@

demo: setup  ## Run the default experiment through MLflow and say what to open
	. $(BIN)/activate && MLFLOW_TRACKING_URI=$(TRACKING) MLFLOW_DISABLE_TELEMETRY=true \
	    mlflow run . --env-manager local --experiment-name llm-healing
	@echo
	@echo "Trajectories, plots and the summary are in MLflow. To see them: make ui"

ui: setup  ## Serve the MLflow UI of the demo on a free port, and say what to open (OPEN=1 opens it)
	@MLFLOW_TRACKING_URI=$(TRACKING) $(BIN)/python -m entrypoints.ui $(if $(OPEN),--open)

# The tiers' times are in CONTRIBUTING.md.
test: setup lint  ## Lint, type-check and run all tests, the fast tier first
	$(BIN)/python -m pytest -m 'not slow'
	$(BIN)/python -m pytest -m slow

test-fast: setup  ## Run the fast tier: everything but whole commands and simulations
	$(BIN)/python -m pytest -m 'not slow'

test-slow: setup  ## Run the slow tier: whole commands, simulations, known outcomes, golden values
	$(BIN)/python -m pytest -m slow

fuzz: setup  ## Try hostile files, records and values ten times as often as the fast tier
	$(BIN)/python -m pytest -m fuzz tests/hostile

kill-points: setup  ## Kill attack, heal and summarize at every write and request, and run them again
	$(BIN)/python -m tests.outages.kill_points attack
	$(BIN)/python -m tests.outages.kill_points heal
	$(BIN)/python -m tests.outages.kill_points summarize

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## Print what the loop, spectra, memory, logging, products and summarizing cost
	$(BIN)/python -m benchmarks

findings: setup  ## Run the protocol on nano from nothing, and write docs/findings.md
	$(BIN)/python -m findings run nano
	$(BIN)/python -m findings render

real-model: setup  ## Fetch a real model of 135 M parameters (98 MB) into ~/.cache/llm-healing
	@$(BIN)/python -m tests.models.real_model

clean:  ## Remove the environment and caches (results stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
