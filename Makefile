# On a fresh machine, start with `make demo` or `make test`. Both create the virtual environment .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extras of the developers' environment; `make demo` installs only cpu.
EXTRAS ?= cpu,rtx,text,report,serve,dev
DEMO_EXTRAS := $(if $(filter command line,$(origin EXTRAS)),$(EXTRAS),cpu)

.PHONY: demo test test-slow gpu-check lint format docs wheelhouse clean

# On a machine with an NVIDIA GPU: make demo EXTRAS=gpu
demo: $(VENV)/with-$(DEMO_EXTRAS)
	$(BIN)/fora-trt demo

# Two processes with one thread each: tracing is single-threaded and takes most of the time.
test: $(VENV)/with-$(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The timed tests of test_figures.py run alone, because other processes would disturb the timings; the others in two
# processes, one test at a time, the longest first.
LONGEST := tests/test_wheelhouse.py tests/test_workers.py tests/test_serve.py tests/test_trajectories.py tests/test_quality.py tests/test_gpu_check.py
test-slow: $(VENV)/with-$(EXTRAS)
	$(BIN)/python -m pytest -m slow --durations=0 tests/test_figures.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --maxschedchunk=1 --durations=12 $(LONGEST) \
		$(filter-out $(LONGEST) tests/test_figures.py,$(sort $(wildcard tests/test_*.py)))

# On a machine with an NVIDIA GPU: make gpu-check CHECK='--minutes 28'; after an interruption: make gpu-check CHECK=--resume.
# It uses the virtual environment if there is one, else PYTHON with its installed packages.
gpu-check:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check $(CHECK)

lint: $(VENV)/with-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/with-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages in docs/ as a site, in the folder site/.
docs: $(VENV)/with-docs
	$(BIN)/mkdocs build --strict

# For a machine without network: make wheelhouse PYTHON=3.12 EXTRAS=rtx WITHOUT=torch (PYTHON is the version on that machine).
# With HAVE=FILE, the output of `pip list` on that machine, only missing distributions are collected.
wheelhouse: EXTRAS = cpu
wheelhouse:
	test -x $(BIN)/python || $(MAKE) $(VENV)/with-cpu PYTHON=python3
	$(BIN)/python -m tools.wheelhouse --python $(PYTHON) --extras '$(EXTRAS)' $(addprefix --without ,$(WITHOUT)) $(if $(HAVE),--have '$(HAVE)')

# pip compiles on one core, compileall on all; it fails for the files that packages keep for other versions of Python.
$(VENV)/with-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is too old: fora-trt needs Python 3.10 or newer; give another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$*]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist site wheelhouse
