#!/usr/bin/env bash
# The checks and the benchmark on one GPU, in one go: tests/gpu/script.sh out/gpu [a checkout of nanochat]
#
# Leaves in the folder: tests.txt (what each test says), training.json and training_nanochat.json, decoding_1.json,
# decoding_64.json (recipes/benchmark.py on a model of 124 million parameters in bf16), and machine.json. It takes the
# Python of the environment that is active.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?the folder to write into}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

python3 - "$out/machine.json" <<'PYTHON'
import json, platform, sys

import torch
import transformers

card = torch.cuda.get_device_properties(0)
machine = {"gpu": card.name, "memory_bytes": card.total_memory, "torch": torch.__version__}
machine |= {"cuda": torch.version.cuda, "transformers": transformers.__version__, "python": platform.python_version()}
open(sys.argv[1], "w").write(json.dumps(machine, indent=1) + "\n")
print(machine)
PYTHON

benchmark() {  # name, options...
	local name=$1
	shift
	python3 recipes/benchmark.py --bf16 true --hidden_size 768 --num_hidden_layers 12 --num_attention_heads 12 \
		--block_size 1024 --vocab_size 50304 --num_key_value_heads 4 --output_dir "$out/$name" "$@" &&
		mv "$out/$name/benchmark.json" "$out/$name.json" && rm -r "${out:?}/$name"
}

status=0
python3 -m pytest -m gpu tests/gpu -q -rA -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -40 || status=1
training=(--measure training --torch_compile true --per_device_train_batch_size 32 --document_tokens 400)
[ -n "${2:-}" ] && training+=(--nanochat "$2")
benchmark training "${training[@]}" || status=1
for rows in 1 64; do
	benchmark "decoding_$rows" --measure decoding --num_prompts "$rows" --cache_implementation static \
		--num_prompt_tokens 128 --num_new_tokens 128 --num_steps 3 || status=1
done
exit $status
