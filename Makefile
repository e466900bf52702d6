# Two commands for a new machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Tested versions; CONSTRAINTS=/dev/null takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.PHONY: venv build demo test bench soak gpu lint type clean

venv: $(VENV)/.ready

# torch first and alone, so that no later package replaces it. Without a GPU, its small build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make venv
$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "s2srm needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[deepspeed,test,dev]'
	touch $@

demo: build
	$(BIN)/s2srm demo

# The compiled kernels; only what changed. Without a compiler the tests say what they leave out.
build: venv
	-$(BIN)/python csrc/build.py

# One thread a process: the tests' matrices are tiny, and torchrun starts two processes more.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Microbenchmarks on this machine's device; python -m benchmarks.compare has the peers.
bench: build
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' \
		--benchmark-only --benchmark-group-by=group --benchmark-sort=min \
		--benchmark-columns=min,median,max,rounds

# Hundreds of kills, exits and faults of two ranks: an hour or more. SOAK=kills, exits, faults.
SOAK ?= all
soak: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(SOAK)

# On a machine with a GPU: kernels (smoke, ceilings, profile, sweep, comparison, tests, counters)
# and trainer (every stage, a PPO phase of Gemma-2B's shape, real data), a short table. Budgets
# under 8 and 6 minutes; one of them with GPU_ARGS='--only kernels'. A second run goes on where the
# first stopped. Takes the torch that $(PYTHON) has and makes no .venv.
gpu:
	PYTHONPATH=kernels:.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: venv
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build runs *.egg-info kernels/s2srm_kernels/*.so
