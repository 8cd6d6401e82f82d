# Commands of the project; each works on a fresh machine with Python 3.10 to 3.13 and nothing else installed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
WORK := .work
INSTALLED := $(VENV)/.installed

.PHONY: help install demo demo-checkpoint test test-quick test-shuffled test-large coverage durations check format bench gpu clean

help:
	@echo "make demo             caption the sample images with the demo checkpoint, on a real Triton server"
	@echo "make test             the whole test suite; its durations are then in .work/test"
	@echo "make test-quick       what needs no server and little time, in at most three minutes"
	@echo "make test-shuffled    the whole test suite, the tests of each module in another order"
	@echo "make coverage         the whole test suite, with what it covers in .work/test; nearly twice as long"
	@echo "make durations        keep the durations of the last make test; by these the next one orders its modules"
	@echo "make test-large       the published models' true shapes, at reduced depth (minutes and gigabytes each)"
	@echo "make check            ruff (lint and format) and mypy strict"
	@echo "make bench            the benchmarks; adds rows to benchmarks/results/"
	@echo "make gpu TORCH=torch  on a GPU: all tests and measurements that it can do, as one report in .work/gpu-report"
	@echo "make demo-checkpoint  train the demo checkpoint again from nothing (2 cores, up to 4 hours, resumable)"
	@echo "make format           let ruff put the code into its form"
	@echo "make clean            remove the virtual environment and everything built"

install: $(INSTALLED)

# torch comes first and by version: left to the resolver, its newest build brings gigabytes of CUDA libraries along.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "numpy<2"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python demo/run.py --work $(WORK)

demo-checkpoint: $(INSTALLED)
	cd demo && ../$(BIN)/python -m blipstream_demo train --work ../$(WORK)/demo-checkpoint

# Two workers, a module's tests together, the slowest module first (tests/conftest.py); a thread each for torch, whose
# threads would wait for each other's cores.
RUN := .work/test
PYTEST := -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations 30 --durations-min 3 --junitxml $(RUN)/junit.xml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(OPTIONS); status=$$?; \
	$(BIN)/python -m tests.support.durations $(RUN)/junit.xml; exit $$status

coverage: $(INSTALLED)
	mkdir -p $(RUN)/coverage && rm -f $(RUN)/coverage/*
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run $(PYTEST) --timeout 240 --junitxml $(RUN)/coverage.xml $(OPTIONS); status=$$?; \
	$(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report > $(RUN)/coverage.txt; \
	grep TOTAL $(RUN)/coverage.txt; exit $$status

test-quick: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --quick --junitxml $(RUN)/quick.xml $(OPTIONS)

test-shuffled:
	$(MAKE) test OPTIONS="--shuffle $$(date +%s)"

durations: $(INSTALLED)
	$(BIN)/python -m tests.support.durations $(RUN)/junit.xml --record

test-large: $(INSTALLED)
	$(BIN)/python -m pytest --large -m large

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run --work $(WORK)

# TORCH must be a build with CUDA, from the environment's first install on: make gpu TORCH=torch. A second run resumes.
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --report $(WORK)/gpu-report --work $(WORK)/gpu $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) $(WORK) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
