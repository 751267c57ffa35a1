# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make the environment in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# of the developers' environment; `make demo` needs less
EXTRAS ?= cpu,rtx,text,report,dev
DEMO_EXTRAS := $(if $(filter command line,$(origin EXTRAS)),$(EXTRAS),cpu)

.PHONY: demo test test-slow gpu-check lint format wheelhouse clean

# On a machine with an NVIDIA GPU: make demo EXTRAS=gpu
demo: $(VENV)/with-$(DEMO_EXTRAS)
	$(BIN)/fora-trt demo

# Two at a time, one thread each: tracing, which takes most of the time, is single-threaded anyway.
test: $(VENV)/with-$(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# What is timed runs alone.
test-slow: $(VENV)/with-$(EXTRAS)
	$(BIN)/python -m pytest -m slow --durations=0 tests/test_figures.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations=12 --ignore tests/test_figures.py

# On a machine with an NVIDIA GPU, in the environment if it was made, else with the packages that PYTHON has:
# make gpu-check CHECK='--minutes 28', and after an interruption make gpu-check CHECK=--resume
gpu-check:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check $(CHECK)

lint: $(VENV)/with-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/with-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a machine without network: make wheelhouse PYTHON=3.12 EXTRAS=rtx WITHOUT=torch (PYTHON is the version there)
# HAVE=FILE, the output of `pip list` there: only what that machine lacks is collected; installed distributions stay.
wheelhouse: EXTRAS = cpu
wheelhouse:
	test -x $(BIN)/python || $(MAKE) $(VENV)/with-cpu PYTHON=python3
	$(BIN)/python -m tools.wheelhouse --python $(PYTHON) --extras '$(EXTRAS)' $(addprefix --without ,$(WITHOUT)) $(if $(HAVE),--have '$(HAVE)')

$(VENV)/with-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fora-trt needs Python 3.10 or newer; give another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist wheelhouse
