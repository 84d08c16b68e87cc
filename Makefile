PYTHON ?= python3
BIN    := .venv/bin
# One thread a process for the tests, which run side by side; everything else takes all cores.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg

.PHONY: help demo test quick lint types check schema drill compare clean

help:               ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

# A stamp a requirements file: installed once, again only when the file changes.
.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/development: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/runtime ## make the demo dataset, train on it, evaluate: a few minutes on two CPU cores
	$(BIN)/python prepare_data.py demo datasets/demo
	$(BIN)/python cross_teacher_contr.py --config configs/configDemo.json --name demo
	@$(BIN)/python evaluateSSL.py --model-path "$$(ls -td runs/*-demo*/ | grep -E -e '-demo(~[0-9]+)?/$$' | head -n 1)checkpoint.pth"

test: .venv/development ## the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

quick: .venv/development ## the tests that take a moment
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow"

lint: .venv/development ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/development ## mypy
	$(BIN)/mypy

check: lint types test ## what CI runs

schema: .venv/runtime ## write configs/config.schema.json and docs/configuration.md from the type of the configuration
	$(BIN)/python -m utils.config

drill: .venv/development ## the fire drill: kills, damage, full disks, dead processes; a table of what survived
	$(TEST_ENV) $(BIN)/python -m tests.drill

# Longer than the demo: 1200 steps a run. --jobs 2: two runs side by side, one core each.
compare: .venv/runtime ## the comparison of docs/reproducing.md on the demo dataset: 3 seeds, with and without unlabeled images
	$(BIN)/python prepare_data.py demo datasets/demo
	$(BIN)/python ablate.py --config configs/configDemo.json --name compare --seeds 0 1 2 --jobs 2 \
	  --set training.num_iterations=1200 --set training.unlabeled.start_iteration=250 \
	  --set training.contrastive.contrast_start=600 --set utils.val_per_iter=200 \
	  --grid training.unlabeled.train_unlabeled=false,true

clean:              ## remove the environment and the demo dataset, not the runs
	rm -rf .venv datasets/demo
