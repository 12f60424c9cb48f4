# Every target sets up what it needs: .venv with an editable install of adderkit and the development tools.
# PYTHON selects the interpreter for .venv (3.10 or newer); ARGS is passed to pytest.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow fuzz lint types check clean

help:
	@echo "make install    create .venv and install adderkit and the development tools"
	@echo "make demo       run 'adderkit demo'"
	@echo "make test       run the tests except the slow ones; ARGS='-k conv' passes options to pytest"
	@echo "make test-slow  run the slow tests"
	@echo "make fuzz       read damaged and made-up files, 10,000 cases of each kind; takes hours"
	@echo "make lint       check style and formatting with ruff"
	@echo "make types      check types with mypy"
	@echo "make check      run lint and types"
	@echo "make clean      remove .venv, caches and build folders; keep runs/"
	@echo
	@echo "PYTHON=python3.12 make install selects the interpreter (3.10 or newer)."

install: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard adder_layers/csrc/*.* adder_layers/csrc/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(sys.version_info < (3, 10) and f"adderkit needs Python 3.10 or newer, found {v}: set PYTHON=")'
	@echo "Installing adderkit and its dependencies into $(VENV). PyTorch is large, so the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@rm -rf build  # CMake would remember a missing or broken compiler, and the install would continue without one
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/adderkit demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu" $(ARGS)

fuzz: $(STAMP)
	ADDERKIT_FUZZ=nightly $(BIN)/pytest tests/fuzz $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The root is the package, whatever the clone's folder is called; mypy finds it by name through a link.
types: $(STAMP)
	@mkdir -p .types && ln -sfn .. .types/adderkit
	MYPYPATH=.types $(BIN)/mypy -p adderkit

# Recursive, so that "make check -k" and "make -j check" print one report after the other.
check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types

clean:
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -path ./runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
