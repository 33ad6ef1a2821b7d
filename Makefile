# Each target makes its own environment first, so `make demo` and `make test` are all there is to
# run on a fresh machine. An environment is made again when pyproject.toml changes.
#
#   make test PYTHON=/path/to/python3.13       with another interpreter
#   make test TEST_ARGS="-k posterior -x"      with options for pytest
#   make demo DEMO_ARGS=--quick                with options for the example
#   make kill KILL_ARGS="--kills 200"          with more of them
#   make referee REFEREE_ARGS="--seeds 0:50"   on other random models

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
REFEREE_ARGS ?=
KILL_ARGS ?=
# Most of a test is compiling, which uses one core; a file's tests share what they have trained.
# In their order, which begins with the long ones; by number of tests, long ones would be the last.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
# The hashes of names decide in which order NumPyro's Trace_ELBO adds up sites; with other ones each
# run would compile these programs anew, and find none of them in the cache of the run before.
PYTEST_ENV := PYTHONHASHSEED=0

.PHONY: help demo test test-slow referee kill lint format bench bench-smoke docs test-lowest clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         train on handwritten digits and draw pictures into output/"
	@echo "make test         run the tests and the examples in docstrings, but those that are slow"
	@echo "make test-slow    run the slow ones: pages, examples, long fits and comparisons"
	@echo "make referee      compare 2,000 random models with NumPyro's own answers"
	@echo "make kill         kill fits with checkpoints at 50 random moments"
	@echo "make lint         check style and types"
	@echo "make format       rewrite the code in the project's style"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make bench        run the benchmarks"
	@echo "make bench-smoke  run the benchmarks at tiny sizes, to see that they run"
	@echo "make test-lowest  run the tests with the oldest versions allowed, on Python 3.12"
	@echo "make clean        remove the environments, caches and builds"

demo: $(VENV)/.installed-examples
	@$(BIN)/python examples/digits_vae.py $(DEMO_ARGS)

test: $(VENV)/.installed-tests
	@$(PYTEST_ENV) $(BIN)/python -m pytest -q $(WORKERS) --durations=10 $(TEST_ARGS)

test-slow: $(VENV)/.installed-tests
	@$(PYTEST_ENV) $(BIN)/python -m pytest -q $(WORKERS) --durations=10 -m slow $(TEST_ARGS)

referee: $(VENV)/.installed-tests
	@$(BIN)/python tests/referee/run.py $(REFEREE_ARGS)

kill: $(VENV)/.installed-tests
	@$(BIN)/python tests/training/killing.py $(KILL_ARGS)

lint: $(VENV)/.installed-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/ty check --python $(VENV)

format: $(VENV)/.installed-lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-benchmarks
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# In the tests' environment, which has no TensorFlow: the comparison with it is left out there.
bench-smoke: $(VENV)/.installed-tests
	@$(BIN)/python benchmarks/run.py --smoke

docs: $(VENV)/.installed-docs
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Built docs/_build/html/index.html"

test-lowest: $(LOWEST)/.installed
	@$(PYTEST_ENV) $(LOWEST)/bin/python -m pytest -q $(WORKERS) --durations=10 $(TEST_ARGS)

clean:
	rm -rf $(VENV) $(LOWEST) build dist docs/_build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- environments ---------------------------------------------------------------------------------

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))
VERSION := import sys; sys.stdout.write(sys.version.split()[0])

# Asks each candidate to run, because a version manager may leave a name on PATH that does not.
$(VENV)/.made: pyproject.toml
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	    for candidate in python3.13 python3.12 python3; do \
	        if $$candidate -c "$(NEW_ENOUGH)" >/dev/null 2>&1; then python=$$candidate; break; fi; \
	    done; \
	fi; \
	if [ -z "$$python" ]; then \
	    echo "numpyro_vae needs Python 3.12 or later and found none on PATH:" \
	        "install one, or name it with PYTHON=/path/to/python3.13." >&2; exit 1; \
	fi; \
	if ! "$$python" -c "$(NEW_ENOUGH)" >/dev/null 2>&1; then \
	    version=$$("$$python" -c "$(VERSION)" 2>/dev/null || echo "not a Python that runs"); \
	    echo "numpyro_vae needs Python 3.12 or later, and $$python is $$version:" \
	        "name another with PYTHON=/path/to/python3.13." >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with Python $$("$$python" -c "$(VERSION)")"; \
	"$$python" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.made
	@echo "Installing numpyro-vae[$*] into $(VENV)"
	@$(PIP) --editable ".[$*]"
	@touch $@

# pip cannot resolve to the oldest versions; uv can. PYENV_VERSION lets pyenv's python3.12 run.
$(LOWEST)/.installed: pyproject.toml $(VENV)/.made
	@echo "Installing the oldest versions that numpyro-vae allows into $(LOWEST)"
	@$(PIP) uv
	@PYENV_VERSION=3.12 $(BIN)/uv venv -q --clear --no-python-downloads --python 3.12 $(LOWEST)
	@$(BIN)/uv pip install -q --python $(LOWEST) --resolution lowest-direct --editable ".[tests]"
	@touch $@
