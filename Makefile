# Every target works from a bare clone: the virtual environment is made on first use and again when the pins change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
RUN := runs/demo
PROCESSES ?= 2
# torchrun's default is one thread a process; this shares out the cores.
THREADS = $(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 1) // $(PROCESSES)))')
# On the CPU, on machines with GPUs too: it gives the README's figures, and PROCESSES may be more than there are GPUs.
TORCHRUN = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node=$(PROCESSES)

.PHONY: install help demo test test-slow lint figures docs dist bench faults soak clean

install: $(READY) ## make .venv with the pinned versions

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -e .venv || { mkdir .venv && touch .venv/made-by-make; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# make would delete a target whose step failed; these files are written whole or not at all.
.PRECIOUS: $(RUN)/%/eval.json

# Both digits recipes are trained, evaluated and compared. A finished part is not repeated; a killed one goes on.
demo: $(RUN)/lip_resnet50/eval.json $(RUN)/resnet50/eval.json ## train and compare LIP-ResNet-50 and ResNet-50 on digits
	$(BIN)/python scripts/make_table.py $(RUN)/lip_resnet50 $(RUN)/resnet50 --output $(RUN)/table.md --force

$(RUN)/%/eval.json: | $(READY)
	$(TORCHRUN) train.py --config configs/digits/$*.yaml --output $(RUN)/$* --resume auto
	$(TORCHRUN) eval.py --checkpoint $(RUN)/$*

test: $(READY) ## run the quick tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY) ## run the long tests
	$(BIN)/python -m pytest -m slow

lint: .venv/ready-dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(READY) ## draw the figures of the pages that are not up to date
	$(BIN)/python scripts/draw_operator.py --output docs/figures/operator.svg
	$(BIN)/python scripts/draw_figures.py

docs: .venv/ready-docs ## refresh the generated parts of the pages and build the site
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/ready-dev ## build a source archive and a wheel in dist/
	$(BIN)/python -m build --no-isolation

.venv/ready-%: requirements-%.txt $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

bench: $(READY) ## measure the operator
	$(BIN)/python scripts/benchmark.py op

# Both work in a temporary folder and leave nothing running.
faults: $(READY) ## kill runs, fill disks, break files (docs/faults.md)
	$(BIN)/python tests/faults/inject.py
	$(BIN)/python scripts/make_docs.py

soak: $(READY) ## train under repeated kills and look for leaks
	$(BIN)/python tests/faults/soak.py

# Removes only what the targets above have made: an environment that make did not make stays, and so do other runs.
clean: ## remove .venv and the demo's runs, if make has made them
	test ! -e .venv/made-by-make || rm -rf .venv
	rm -rf runs/demo/lip_resnet50 runs/demo/resnet50 runs/demo/table.md
	test ! -d runs/demo || rmdir --ignore-fail-on-non-empty runs/demo
