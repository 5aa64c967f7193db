# `make demo` and `make test` set up .venv if needed.
SHELL := /bin/sh
PYTHON ?= python3
DEMO ?= demo
SEED ?= 0
export DATA DEMO SEED STEPS

.PHONY: demo test test-cluster test-vllm setup captioner lint clean

setup: .venv/.ready

# Every file that decides what is installed, and nothing else, so that no other change causes a reinstall.
.venv/.ready: deploy/setup.sh deploy/venv.sh deploy/constraints.txt pyproject.toml
	@sh deploy/setup.sh "$(PYTHON)"
	@touch .venv/.ready
	@echo "setup: .venv is ready"

# vLLM has a separate environment, which pipeline/caption.py finds.
captioner: .venv-captioner/.ready

.venv-captioner/.ready: deploy/setup-captioner.sh deploy/venv.sh deploy/constraints-captioner.txt \
		deploy/torchvision_operators.py pyproject.toml
	@sh deploy/setup-captioner.sh "$(PYTHON)"
	@touch .venv-captioner/.ready

demo: setup
	@sh deploy/demo.sh

test: setup lint
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -n 2
	@$(MAKE) --no-print-directory captioner || \
		echo "make test: SKIPPED the tests with vLLM: .venv-captioner could not be set up, see the error above"
	@$(MAKE) --no-print-directory --keep-going test-cluster test-vllm

test-cluster:
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -m cluster -n 2 \
		$$(grep -rl --include="*.py" mark.cluster tests)

test-vllm:
	@if $(MAKE) --question .venv-captioner/.ready; then \
		.venv-captioner/bin/python -m pytest tests/captioner/engines/test_vllm.py tests/pipeline/test_caption_vllm.py; \
	fi

lint: setup
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy

clean:
	rm -rf .venv .venv-captioner "$(DEMO)"
