# Each target does its own set-up: Python 3.11+ and pip are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench clean

help:
	@echo "make demo       route prompts, draw them on both sides, lose the cloud, draw on"
	@echo "make test       the tests"
	@echo "make test-slow  the slow tests too (clean installs, training)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the tables of benchmarks/"
	@echo "make clean      remove what these made, .venv included"
	@echo "Arguments go in ARGS, as in: make demo ARGS='--share 0.5'"

demo: $(VENV)/.runs
	$(BIN)/python -m demo $(ARGS)

# By file, since fixtures that take long are shared within one; beside each other further threads
# of torch and onnxruntime would only wait.
test: $(VENV)/.develops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(VENV)/.develops
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: $(VENV)/.develops
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.runs
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist models/dist demo/bundle demo/bundle.partial demo/pictures \
		demo/contact-sheet.png demo/report.json demo/cloud-server.log .pytest_cache \
		.hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "RouteT2I Edge needs Python 3.11 or newer and '$(PYTHON)' is not:" \
			"name another, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed: install the venv module" \
			"(on Debian: apt install python3-venv) and try again" >&2; exit 1; }

# The stamps make a second run start at once; a change of what is to be installed renews them.
$(VENV)/.runs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once; torch is the large part, some minutes on a slow line)"
	$(PIP) install -c constraints.txt -e ".[cloud,export]"
	@touch $@

$(VENV)/.develops: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once; torch is the large part, some minutes on a slow line)"
	$(PIP) install -c constraints.txt -e ".[cloud,export,dev]"
	@touch $(VENV)/.runs $@
