# make demo: install everything, then train source-only and FtD++ on the built-in street world and compare them.
# make test: install everything, then lint, type check and test.
# make gpu-test: install everything, then check every kernel on this machine's GPU.
# All need Python 3.11 or newer, make and a C++ compiler, and share one virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test gpu-test setup clean

setup: $(STAMP)

# torch first: torch-scatter imports it while it builds, in parallel and without debugging symbols, which would take half of the
# time. Everything is pinned by constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade setuptools wheel -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt) -c constraints.txt
	@echo "compiling torch-scatter: one to three minutes, once"
	$(BIN)/python -c 'import os; print(f"[build_ext]\nparallel = {os.cpu_count()}")' > $(VENV)/build.cfg
	CXXFLAGS='-g0 -DNDEBUG' DIST_EXTRA_CONFIG="$(abspath $(VENV))/build.cfg" \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation torch-scatter -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[dev,tensorboard,clip]' -c constraints.txt
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/ftdpp  # mypy finds the flat modules under their package name
	touch $@

# A quarter of the small preset's iterations, so that it ends, set-up included, while one watches. Day to night: the pair on which
# the method wins most, and a night needs no explaining.
DEMO = runs/demo
demo: setup
	$(BIN)/ftd compare --src day --tgt night --methods source-only,ftdpp --preset small --out $(DEMO) \
		--set steps=256 --set milestones=192 --set val_every=128
	$(BIN)/ftd report $(DEMO)/day-night-source-only*seed0 $(DEMO)/day-night-ftdpp*seed0 --out $(DEMO)/report.html
	@echo
	@echo "trained on days, tested on nights that had no labels. Table: above, and $(DEMO)/compare.json"
	@echo "Open in a browser: $(abspath $(DEMO))/report.html (curves, confusion, and the frames where it gains and loses)"

# Each test process computes on one thread: most tensors of the tests are too small for two. The golden numbers need two, which
# must sleep where they wait for each other: awake, they take the cores from one another. No more than four processes, since each
# builds the tests' worlds anew and holds networks of the paper's size.
test: setup
	$(BIN)/ruff check .
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -p ftdpp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The first minute on a GPU: each operation against float64 in every precision, then the same tests on the device. Warnings of
# versions that we do not know must not fail them.
gpu-test: setup
	$(BIN)/ftd doctor --device cuda
	$(BIN)/python -m pytest -W default tests/test_triton.py tests/test_golden.py

clean:
	rm -rf $(VENV) build *.egg-info
