PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all gpu-check lint format docs data install clean

demo: data
	deepspeed launch/distill.py

data: install
	python examples/quickstart_data.py
	python launch/prepare_data.py --config examples/quickstart_corpus.yaml

test: data
	pytest -n 2 --dist worksteal tests/unit tests/kernels
	pytest tests/distributed tests/faults tests/integration tests/multinode

test-all: data
	MAPDISTILL_FAULTS=2 MAPDISTILL_LAUNCHER=real pytest tests

gpu-check: data
	python benchmarks/gpu_check.py

lint: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: install
	ruff format .
	ruff check --fix .

docs: install
	python docs/generate.py

install: $(VENV)/.installed

# torch first and alone: the exact version resolves to a CPU build where one is at hand, a bare name to gigabytes
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
