# make demo    sets up, then exports the demo model for an iPhone and proves it
# make test    sets up, then runs all tests
# make parity  exports the demo in both formats and holds them to ci/parity.toml
# make test-optimum  tests beside the older transformers that optimum-onnx wants, in an environment of their own
# make lint    format, lint, types, import layering
# make format  rewrites what the formatter would

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPTIMUM_VENV := .venv-optimum
OPTIMUM_READY := $(OPTIMUM_VENV)/.ready

.PHONY: demo parity test test-optimum lint format clean

demo: $(READY)
	$(BIN)/phi3edge export demo --target iphone --force

parity: $(READY)
	$(BIN)/phi3edge export demo --target cpu --format both --out dist/parity --no-validate --force
	$(BIN)/phi3edge ci dist/parity --gates ci/parity.toml --chunks 8 --out dist/parity-results

test: $(READY)
	$(BIN)/python -m pytest

test-optimum: $(OPTIMUM_READY)
	$(OPTIMUM_VENV)/bin/python -m pytest -m optimum tests/test_optimum.py
	$(OPTIMUM_VENV)/bin/python -m pytest tests/test_genai_tokenizer.py tests/test_emit_ort_genai.py tests/test_kv_calibration.py

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

$(OPTIMUM_READY): pyproject.toml constraints-optimum.txt
	test -x $(OPTIMUM_VENV)/bin/python || $(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet --constraint constraints-optimum.txt --editable '.[onnx,optimum,reference]' pytest
	touch $(OPTIMUM_READY)

clean:
	rm -rf $(VENV) $(OPTIMUM_VENV) dist build *.egg-info
