PYTHON ?= python3
export PYTHON

VENV := .venv
VENV_0_10 := .venv-0.10.0
VENV_0_32 := .venv-0.32.0
VENV_DOCS := .venv-docs
MODEL := models/SmolLM2-135M-Instruct
# The Triton of vLLM 0.10.0, 0.12.0 and 0.24.0, the newest, and that of vLLM 0.33.0, under which all are compiled.
COMPILE := tools/compile_kernels.sh $(VENV)/bin/python 3.3.1 3.5.0 3.6.0 3.9.0 3.8.0
# What `make test` does with what only its last tests needed: nothing, or 'rm -rf' where the disk is small.
DISCARD ?= :

# 2 GB of KV cache is enough for the model used here; nothing is to be fetched or reported.
export VLLM_CPU_KVCACHE_SPACE ?= 2
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1
# An engine is several processes. Without bytecode on the disk each compiles torch and vLLM again, which doubles its start.
unexport PYTHONDONTWRITEBYTECODE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: env model ## generate with the sparse prefill on vLLM 0.12.0's CPU engine
	$(VENV)/bin/python scripts/generate.py

test: ## run all tests on the CPU engines of vLLM 0.12.0, 0.32.0 and 0.10.0; compile the kernels
	@status=0; \
	for part in test-0.12 compile discard-0.12 test-0.32 discard-0.32 test-0.10 discard-0.10; do \
		$(MAKE) --no-print-directory $$part || status=1; \
	done; \
	exit $$status

test-0.12: env model
	$(VENV)/bin/python -m pytest -rs tests/cpu tests/engine

test-0.32: env-0.32 model
	$(VENV_0_32)/bin/python -m pytest -rs tests/engine tests/cpu/hf

test-0.10: env-0.10 model
	$(VENV_0_10)/bin/python -m pytest -rs tests/engine

discard-0.12:
	@$(DISCARD) $(VENV) .triton

discard-0.32:
	@$(DISCARD) $(VENV_0_32)

discard-0.10:
	@$(DISCARD) $(VENV_0_10)

compile: env ## compile the kernels for six kinds of GPUs under five versions of Triton; needs no GPU
	@$(COMPILE)

lint: env ## check style and format
	@status=0; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --check . || status=1; \
	exit $$status

docs: $(VENV_DOCS)/.stamp ## write the tables and plots of README.md and docs/ from the rows in results/
	@$(VENV_DOCS)/bin/python -m tools.docs

$(VENV_DOCS)/.stamp:
	@$(PYTHON) -m venv $(VENV_DOCS)
	@$(VENV_DOCS)/bin/python -m pip install --quiet --disable-pip-version-check matplotlib
	@touch $@

clean: ## remove the environments, the model and what builds and tests left
	rm -rf $(VENV) .venv-0.* $(VENV_DOCS) .triton models build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@scripts/setup_cpu_env.sh 0.12.0 $(VENV)

env-0.10:
	@scripts/setup_cpu_env.sh 0.10.0 $(VENV_0_10)

env-0.32:
	@scripts/setup_cpu_env.sh 0.32.0 $(VENV_0_32)

model: $(MODEL)/config.json

$(MODEL)/config.json:
	@$(MAKE) --no-print-directory env
	@$(VENV)/bin/python scripts/fetch_model.py

.PHONY: help demo test test-0.12 test-0.32 test-0.10 discard-0.12 discard-0.32 discard-0.10 compile lint docs clean env env-0.10 env-0.32 model
.DEFAULT_GOAL := help
