# Every target works from a bare clone: the virtual environment is made on first use and again when the pins change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
RUN := runs/demo
PROCESSES ?= 2
# torchrun's default is one thread a process; this shares out the cores.
THREADS = $(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 1) // $(PROCESSES)))')
# On CPUs everywhere: the README's figures, and no more processes than there are GPUs.
TORCHRUN = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node=$(PROCESSES)

.PHONY: install demo test test-slow lint bench faults soak clean

install: $(READY)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -e .venv || { mkdir .venv && touch .venv/made-by-make; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Keeps what a failed step made; every file is written whole or not at all.
.PRECIOUS: $(RUN)/%/eval.json

# Both digits recipes are trained, evaluated and compared. A finished part is not repeated; a killed one goes on.
demo: $(RUN)/lip_resnet50/eval.json $(RUN)/resnet50/eval.json
	$(BIN)/python scripts/make_table.py $(RUN)/lip_resnet50 $(RUN)/resnet50 --output $(RUN)/table.md --force

$(RUN)/%/eval.json: | $(READY)
	$(TORCHRUN) train.py --config configs/digits/$*.yaml --output $(RUN)/$* --resume auto
	$(TORCHRUN) eval.py --checkpoint $(RUN)/$*

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python scripts/benchmark.py op

# Both go on where they were stopped, and leave nothing running.
faults: $(READY)
	$(BIN)/python tests/faults/inject.py

soak: $(READY)
	$(BIN)/python tests/faults/soak.py

# Only what the targets above have made: an environment that was there before them stays, and other runs too.
clean:
	test ! -e .venv/made-by-make || rm -rf .venv
	rm -rf runs/demo/lip_resnet50 runs/demo/resnet50 runs/demo/table.md
	test ! -d runs/demo || rmdir --ignore-fail-on-non-empty runs/demo
