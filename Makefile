# All of it needs Linux, Python 3.11+ and make; everything is installed into .venv first.
PYTHON ?= python3
BIN := .venv/bin
BENCH ?=
GPU_CHECK ?=
TORTURE ?=
DIGITS := data/digits
RUN := runs/digits_dino

.PHONY: install quickstart test-fast test test-full lint format bench gpu-check torture docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (about 6 GB, most of it torch; a few minutes)"
	@test "$$(df -Pk .venv | awk 'NR==2 {print int($$4 / 1048576)}')" -ge 7 || df -h .venv >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Idle threads must not spin: on a few cores they would hold up the process that reads the images.
quickstart: export OMP_WAIT_POLICY = passive
quickstart: .venv/installed
	@test -d $(DIGITS)/train || $(BIN)/python -m data_tools.make_shards source=digits split=train output=$(DIGITS)/train
	@test -d $(DIGITS)/test || $(BIN)/python -m data_tools.make_shards source=digits split=test output=$(DIGITS)/test
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		pretrain.py recipe=digits_dino output=$(RUN)
	$(BIN)/python -m eval.knn run=$(RUN) train=$(DIGITS)/train test=$(DIGITS)/test baselines=true
	$(BIN)/python -m eval.linear run=$(RUN) train=$(DIGITS)/train test=$(DIGITS)/test baselines=true
	@$(BIN)/python -m eval.table run=$(RUN)

# What the tests compile is kept, whatever the shell says: it is a third of the time that they take to begin.
test-fast test test-full: export PYTHONDONTWRITEBYTECODE =

# While you work: no test that starts several processes, none that takes long, a few methods for all; a minute on 2 cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow and not ddp and not other"

# Before a commit: at most 10 minutes on 2 cores.
test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Everything; at most 45 minutes on 2 cores.
test-full: lint
	$(BIN)/python -m pytest -n 2

# Against our peers, on this machine; about 25 minutes on 2 cores. make bench BENCH="imagenet=FOLDER only=input rounds=9"
bench: export OMP_WAIT_POLICY = passive
bench: .venv/installed-bench
	$(BIN)/python -m benchmarks $(BENCH)

# The first ten minutes on a GPU: does all work, how fast, which defaults should change. make gpu-check GPU_CHECK="only=compile minutes=30"
gpu-check: .venv/installed
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

# What docs/reliability.md promises, tried: kills, faults, wrong inputs, damaged bytes. make torture TORTURE="rounds=100 seed=3"
torture: .venv/installed
	$(BIN)/python -m tests.torture $(TORTURE)

.venv/installed-bench: .venv/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

# The pages of docs/ with the tables that are made from the code, into build/docs; nothing is loaded from elsewhere.
docs: .venv/installed-docs
	$(BIN)/python docs/generated.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

.venv/installed-docs: .venv/installed
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
