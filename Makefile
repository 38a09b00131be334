PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-all test-oldest gpu-check lint format docs data install clean

demo: data
	deepspeed launch/distill.py

data: install
	python examples/quickstart_data.py
	python launch/prepare_data.py --config examples/quickstart_corpus.yaml

# Real runs first: they wait for DeepSpeed's operators, which are compiled once
test: data
	pytest tests/distributed tests/faults tests/integration tests/multinode
	pytest -n 2 --dist worksteal tests/unit tests/kernels

test-all: data
	MAPDISTILL_FAULTS=2 MAPDISTILL_LAUNCHER=real pytest tests
	$(MAKE) test-oldest

# Real runs first: they wait for DeepSpeed's operators, which are compiled anew for the oldest torch
test-oldest: export PATH := $(CURDIR)/.venv-oldest/bin:$(PATH)
test-oldest:
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	pytest tests/distributed/test_products.py -k 'export_script or tensorboard'
	pytest tests/distributed/test_proxy.py -k two_ranks
	pytest tests/distributed/test_finetune.py -k patience
	pytest -n 2 tests/unit tests/kernels

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
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .cache .pytest_cache .mypy_cache .ruff_cache
