# Every target makes its own virtual environment, .venv, on first use. Needs Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --editable '.[test]'
OTHERS := The versions in constraints.txt are not to be had here: taking what pyproject.toml allows. The last digits may differ.

# A foreign JUPYTER_PATH would outrank the environment's own kernel; two threads a worker are slower than one.
unexport JUPYTER_PATH
export JUPYTER_DATA_DIR := $(CURDIR)/$(VENV)/share/jupyter
export OMP_NUM_THREADS ?= 1
# Attacks ask for the same memory again and again: glibc keeps it rather than hand it back to the system each time.
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

.PHONY: help reproduce test lint check-notebooks docs lab notebooks install dist clean
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

reproduce: $(READY) ## run all notebooks in the cpu profile and regenerate figures/
	$(BIN)/gipip reproduce --profile cpu

test: lint docs ## style, types, the site, unit and property tests, then every committed notebook through nbval
	$(BIN)/python -m pytest -n 2 tests
	GIPIP_HEADLESS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=900 -p no:cacheprovider notebooks

lint: $(READY) ## style and types alone
	$(BIN)/ruff check gipip tests benchmarks data docs notebooks
	$(BIN)/ruff format --check gipip tests benchmarks data docs notebooks
	$(BIN)/mypy

check-notebooks: $(READY) ## the committed notebooks are executed, without errors and without stderr
	$(BIN)/python -m pytest -q tests/test_notebooks.py

docs: $(READY) ## build the site of all pages, notebooks (as committed) and docstrings: docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -j 2 -c docs -d docs/_build/doctrees . docs/_build/html

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_quickstart.ipynb

notebooks: $(READY) ## execute the committed notebooks in place (smoke profile), after editing them
	$(BIN)/gipip reproduce --profile smoke --in-place

dist: $(READY) ## build what would be published: dist/*.tar.gz and dist/*.whl
	$(BIN)/hatchling build

install: $(READY) ## make the environment, .venv, and do nothing else

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else "gipip needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt || { echo "$(OTHERS)"; $(INSTALL); }
	touch $@

clean: ## remove the environment and all results (figures stay)
	rm -rf $(VENV) dist results figures/smoke docs/_build
