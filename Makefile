# Each target makes .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
WORKERS ?= 2
# Long tests often wait for processes of their own: a third worker fills the gaps.
SLOW_WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
BENCHES := startup overhead speedup growth ranks reuse reward_batching kill_resume paper_model
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: venv demo test test-slow lint docs bench

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# FAST=1 for the short form
demo: $(STAMP)
	$(BIN)/tiltflow demo $(if $(filter 1,$(FAST)),--fast)

# A file's tests stay in one process, which has the file's fixtures.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not long"

# what takes minutes by itself: compiled architectures, kills
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n $(SLOW_WORKERS) --dist loadfile --no-loadscope-reorder -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

# site/, from the documents and docstrings; a broken link or a bare public name fails
docs: $(STAMP)
	$(BIN)/python scripts/build_site.py

# what docs/lab/benchmarks.md and docs/distributed.md report; the longer studies have a command of their own
bench: $(STAMP)
	@for name in $(BENCHES); do echo "== $$name"; \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done
