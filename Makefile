# The commands of the project. `make help` explains every target.
PROFILE ?= mini
PARAMS  ?=
JOBS    ?= 2
CLUSTER :=
PYTHON  ?= python3
BIN     := .venv/bin
READY   := .venv/.ready
OFFLINE  = $(if $(wildcard wheelhouse/*.whl),--no-index --find-links wheelhouse)
# in the order of folders, with the short notebooks of the workshop last, so that no worker waits long for another
WORKERS  = -n "$$JOBS" --dist loadscope --no-loadscope-reorder
NBVAL    = --nbval --nbval-current-env --nbval-kernel-startup-timeout 180 --nbval-cell-timeout 600 --nbval-sanitize-with tests/nbval.cfg
# exactly as typed: otherwise make would evaluate $(…) in them, and a shell the whole text
override PARAMS  := $(value PARAMS)
override PROFILE := $(value PROFILE)
override JOBS    := $(value JOBS)
override CLUSTER := $(value CLUSTER)
export VITREG_CLUSTER := $(CLUSTER)
export PARAMS PROFILE JOBS
export OMP_NUM_THREADS ?= $(if $(filter 1,$(JOBS)),,1)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-all report test test-fast test-notebooks test-slurm lab workshop wheelhouse bench bench-train twins refresh keep lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-zA-Z%-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PROFILE=mini|small|large|paper   models and images (mini: offline, in the repository)"
	@echo "  PARAMS='n_images=64 models=\"mini-deit3 mini-clip\"'   parameters of the notebook      JOBS=2   notebooks at once"
	@echo "  CLUSTER=slurm                    each notebook as a job of a cluster: docs/use.md"

setup: $(READY) ## make the environment in .venv (by uv if it is installed, else by pip)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=python3.12")'
	@echo "making the environment in .venv: about half a minute with uv, a few minutes with pip"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv -q --allow-existing --python $(PYTHON) .venv && \
	  { uv pip install -q --python $(BIN)/python $(OFFLINE) -e '.[all]' -c constraints.txt || uv pip install -q --python $(BIN)/python $(OFFLINE) -e '.[all]'; }; \
	else \
	  $(PYTHON) -m venv .venv && \
	  { $(BIN)/pip install -q --disable-pip-version-check $(OFFLINE) -e '.[all]' -c constraints.txt || $(BIN)/pip install -q --disable-pip-version-check $(OFFLINE) -e '.[all]'; }; \
	fi
	@touch $@

reproduce-%: $(READY) ## reproduce-fig4, reproduce-table2: one item, its verdicts and its figure
	@$(BIN)/python workflow/run.py '$*'

reproduce-all: $(READY) ## all items of the paper; items that are up to date do not run
	@$(BIN)/python workflow/run.py all

report: $(READY) ## a page of all results of PROFILE
	@$(BIN)/vitreg report --profile "$$PROFILE"

test: $(READY) ## all tests, including the notebooks (by nbval) and the explorer in a browser
	@sh workflow/chromium.sh >/dev/null || true  # without it the browser test fails and says what is missing
	@VITREG_BATCH=1 VITREG_RESULTS="$(CURDIR)/results/test" $(BIN)/python -m pytest -q $(WORKERS) $(NBVAL) tests notebooks

test-fast: $(READY) ## the tests for everyday changes: no notebooks, no tests marked slow
	@$(BIN)/python -m pytest -q -n "$$JOBS" --dist loadscope -m "not slow" tests

test-notebooks: $(READY) ## only the notebooks
	@VITREG_BATCH=1 VITREG_RESULTS="$(CURDIR)/results/test" $(BIN)/python -m pytest -q $(WORKERS) $(NBVAL) notebooks

test-browser: $(READY) ## the explorer in JupyterLab and Chromium (installed if missing)
	@sh workflow/chromium.sh >/dev/null
	@$(BIN)/python -m pytest -q -s tests/browser

gallery: $(READY) ## run the browser test and write its screenshots into docs/gallery/
	@VITREG_GALLERY=1 $(MAKE) --no-print-directory test-browser

test-slurm: $(READY) ## run a sweep on a local Slurm with failures, and compare it with a local run
	@$(BIN)/python -m tests.slurm

lab: $(READY) ## open JupyterLab at the notebooks
	@$(BIN)/jupyter lab --notebook-dir="$(CURDIR)" notebooks

workshop: $(READY) ## open the course of 90 minutes in five notebooks: docs/workshop.md
	@$(BIN)/python workflow/workshop.py --open

wheelhouse: $(READY) ## put all packages into wheelhouse/, to set up laptops without a network
	@$(BIN)/python workflow/wheelhouse.py

bench: $(READY) ## measure times, as ratios within one run, into docs/performance.md
	@env -u OMP_NUM_THREADS PYTHONPATH="$(CURDIR):$(CURDIR)/notebooks/paper" $(BIN)/python -m tests.bench

bench-train: $(READY) ## only the parts on training: images per second vs. timm's script, cost of registers
	@env -u OMP_NUM_THREADS $(BIN)/python -m tests.bench train gpu

twins: $(READY) ## train registers into DeiT-Ti and ViT-Ti: ten models, then the whole experiment (hours on a CPU; resumes)
	@$(BIN)/python workflow/twins.py weights
	@$(BIN)/python workflow/twins.py run --jobs $(JOBS) && $(BIN)/python workflow/twins.py keep

refresh: $(READY) ## execute all notebooks (or NOTEBOOKS="fig04 tab02") in place, write data/records/
	@$(BIN)/python workflow/refresh.py $(NOTEBOOKS) && $(BIN)/python workflow/readme.py

keep: $(READY) ## copy records and PNG figures of PROFILE under docs/results/, to be committed
	@$(BIN)/python workflow/keep.py "$$PROFILE" && $(BIN)/python workflow/readme.py

lint: $(READY) ## check the style by ruff
	@$(BIN)/ruff check vitreg_lib tests workflow && $(BIN)/ruff format --check vitreg_lib tests workflow

clean: ## remove results and caches (not .venv, runs or data)
	rm -rf results .snakemake .pytest_cache .hypothesis .ruff_cache
