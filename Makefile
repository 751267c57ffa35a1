# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make the environment in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= cpu,rtx,plot,dev

.PHONY: demo test test-slow gpu-check lint format wheelhouse clean

demo: $(VENV)/installed
	$(BIN)/fora-trt demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# On a machine with an NVIDIA GPU, with whichever backends are installed: make gpu-check EXTRAS=gpu,plot,dev
gpu-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_check

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a machine with an NVIDIA GPU: make demo EXTRAS=gpu,plot,dev
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fora-trt needs Python 3.10 or newer; give another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# For a machine without network: make wheelhouse PYTHON=3.12 EXTRAS=rtx WITHOUT=torch (PYTHON is the version there)
wheelhouse: EXTRAS = cpu
wheelhouse:
	test -x $(BIN)/python || $(MAKE) $(VENV)/installed PYTHON=python3 EXTRAS=cpu,plot,dev
	$(BIN)/python -m tools.wheelhouse --python $(PYTHON) --extras '$(EXTRAS)' $(addprefix --without ,$(WITHOUT))

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist wheelhouse
