# Every target sets up what it needs in .venv; only Python 3.10 to 3.13 and make have to be there.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test test-vllm check format bench-memory clean

demo: $(VENV)/installed
	$(BIN)/zqfp-convert demo

test: $(VENV)/developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python tests/with_vllm/refused.py
	OMP_NUM_THREADS=1 $(VLLM)/bin/python tests/with_vllm/layers.py
	OMP_NUM_THREADS=1 $(VLLM)/bin/python tests/with_vllm/served.py
	OMP_NUM_THREADS=1 $(VLLM)/bin/python tests/with_vllm/exported.py

check: $(VENV)/developing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/developing
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench-memory: $(VENV)/installed
	$(BIN)/python tests/benchmarks/memory.py

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info

$(VENV)/installed: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e .
	touch $@

$(VLLM)/installed: pyproject.toml tests/constraints.txt tests/with_vllm/environment.sh
	tests/with_vllm/environment.sh $(PYTHON) $(VLLM)
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e ".[dev]"
	touch $@
