# `make demo` trains on the embedded demo, `make test` runs the tests; each makes the virtual environment first.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools-installed

.PHONY: demo test test-all lint clean

# An interrupted demo goes on where it was; a finished one prints its table again. `rm -r runs/demo` starts afresh.
# One thread: beside other work, several threads of a policy this small wait for each other.
demo: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/searche1-lite train --preset demo --out runs/demo --resume

test: $(TOOLS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-all: $(TOOLS)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(TOOLS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# The stamp is younger than both files exactly when what they ask for is installed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, the first time"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(TOOLS): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
