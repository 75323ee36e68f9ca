# Every target sets up what it needs. VENV and PYTHON can be given: make test VENV=/tmp/env PYTHON=python3.12
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
BIN = $(VENV)/bin
READY = $(VENV)/.installed
FIXTURES ?= tests/fixtures
TORCH = $(shell grep '^torch==' constraints.txt)
CHECKED = vader_backend nodes tools tests benchmarks

.PHONY: demo families rewards bench mini parity workflows locales screenshots test test-full test-comfyui lint clean

demo: $(READY)
	$(BIN)/python -m vader_nodes run workflows/api/demo.json

families: $(READY)
	$(BIN)/python -m vader_nodes.tools.families

rewards: $(READY)
	$(BIN)/python -m vader_nodes.tools.rewards_measured

# Takes hours; each keeps the rows that are there, so that it can be stopped and run again.
bench: $(READY)
	$(BIN)/python -m vader_nodes.benchmarks.memory_ladder
	$(BIN)/python -m vader_nodes.benchmarks.step_time
	$(BIN)/python -m vader_nodes.benchmarks.cost_growth
	$(BIN)/python -m vader_nodes.benchmarks.reward_against_time

mini: $(READY)
	$(BIN)/python -m vader_nodes.vader_backend.mini.recipe

test: lint
	$(BIN)/python -m pytest -n auto --ignore=tests/comfyui

test-full: lint
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,8bit]'
	$(BIN)/python -m pytest -n auto --slow --ignore=tests/comfyui

test-comfyui: $(READY)
	$(BIN)/python -m pytest tests/comfyui -rs

parity: $(READY)
	$(BIN)/python -m vader_nodes.tools.parity $(FIXTURES)

workflows: $(READY)
	$(BIN)/python -m vader_nodes.tools.workflows

locales: $(READY)
	$(BIN)/python -m vader_nodes.tools.locales

screenshots: $(READY)
	$(BIN)/python -m vader_nodes.tools.example_graphs
	$(BIN)/python -m vader_nodes.tools.screenshots

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)

# torch goes first and alone, so that a CPU build found by pip is taken and not replaced afterwards.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer; run make with PYTHON=python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_ARGS) $(TORCH)
	$(BIN)/pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
