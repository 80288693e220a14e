# make demo: from raw text to a model that writes. make test: the environment and the tests. make help: the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Make the environment in .venv, with the exact versions of constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hfllm needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install  ## Train a tokenizer and a small model on Python's own library, and let it write (10 minutes on two cores)
	$(BIN)/python recipes/train_tokenizer.py --config recipes/configs/tokenizer_demo.yaml --output_dir out/tokenizer
	$(LAUNCH) recipes/pretrain.py --config recipes/configs/pretrain_demo.yaml --tokenizer out/tokenizer --output_dir out/demo
	$(BIN)/python recipes/generate.py --model out/demo --prompt "def read(self, " --temperature 0.7 --num_samples 2
	@echo
	@echo "out/tokenizer   the tokenizer, and tokenizer_report.json: how well it compresses held-out text"
	@echo "out/demo        the model, its curves (curves.png), numbers (metrics.json), log and checkpoints"
	@echo
	@echo "Next: source $(BIN)/activate, and let it write something else:"
	@echo "    python recipes/generate.py --model out/demo --prompt 'import ' --num_samples 3"
	@echo "or train one on your own text:"
	@echo "    python recipes/train_tokenizer.py --dataset my.txt --output_dir out/my-tokenizer"
	@echo "    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\"
	@echo "        --config recipes/configs/pretrain_demo.yaml --dataset my.txt --tokenizer out/my-tokenizer --output_dir out/mine"

test: install  ## Lint, and run the tests that need neither GPU nor network nor much time
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: install  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu and not hub"

lint: install  ## Lint, and check formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Delete the environment and what the demo wrote
	rm -rf $(VENV) out
