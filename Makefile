# make demo    sets up, then exports the demo model for an iPhone and proves it
# make test    sets up, then runs all tests
# make lint    format, lint, types, import layering
# make format  rewrites what the formatter would

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format clean

demo: $(READY)
	$(BIN)/phi3edge export demo --target iphone --force

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llama-cpp-python has no ready-made wheel for every machine: the first set-up compiles it for some minutes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV); the first time this compiles llama.cpp, which takes about 8 minutes on 2 cores."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) dist build *.egg-info
