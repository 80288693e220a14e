"""Saving a sharded model: gathered by the main process, or in pieces by each, in turns in one run of four processes.

    python docs/measurements/saves.py --output saves.json

Run it from the repository's root; `measure.py saves` does, and keeps the numbers. For each save: the seconds for which
training waits, the seconds until the checkpoint is complete (nothing trains meanwhile), and by how much the memory of
each process grows, from `VmHWM` of /proc (Linux). Every number is the minimum of the rounds, because other programs
can only make it larger.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

import hfllm
from hfllm.runs.processes import on_main_process
from hfllm.training.checkpoint import save_checkpoint
from hfllm.training.devices import start_accelerator
from hfllm.training.optimization import build_muon
from hfllm.training.saving import CheckpointSaver


ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 4
SHAPE = {"vocab_size": 8192, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args)
        return
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/fsdp2.yaml"]
    launcher += ["--num_processes", str(NUM_PROCESSES), "--mixed_precision", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *sys.argv], cwd=ROOT, env=environment, check=True)
    print(args.output.read_text(encoding="utf-8"))


def measure(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(per_device_train_batch_size=1)
    torch.manual_seed(0)
    model = hfllm.GPTForCausalLM(hfllm.GPTConfig.from_preset("modern", max_position_embeddings=64, **SHAPE))
    num_parameters = model.num_parameters()
    rates = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.85}
    optimizer = build_muon(model, **rates, betas=(0.9, 0.95), epsilon=1e-8)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = torch.randint(SHAPE["vocab_size"], (1, 64))
    accelerator.backward(model(input_ids=rows, labels=rows, use_cache=False).loss)
    optimizer.step()  # the averages are there now
    optimizer.zero_grad()

    parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
    name = on_main_process(accelerator, tempfile.mkdtemp)
    saver = CheckpointSaver(Path(name) / "pieces", **parts, keep=1)
    waits: dict[str, Callable[[int], None]] = {
        "gathered": lambda step: save_checkpoint(Path(name) / "gathered", state={"step": step}, keep=1, **parts),
        "in_pieces": lambda step: saver.save({"step": step}),
    }
    rounds: dict[str, list[dict[str, list[float]]]] = {name: [] for name in waits}
    for step in range(args.rounds + 1):
        for kind, save in waits.items():
            accelerator.wait_for_everyone()
            before = fresh_peak()
            start = time.perf_counter()
            save(step)
            waited = time.perf_counter() - start
            saver.wait()
            own = {"training_waits": waited, "complete_after": time.perf_counter() - start}
            own["extra_mib"] = (status("VmHWM") - before) / 1024
            every = gather_object([own])
            if step > 0:  # the first round also fills caches
                rounds[kind].append({measure: [one[measure] for one in every] for measure in own})
    if accelerator.is_main_process:
        folder = next((Path(name) / "gathered").glob("step-*"))
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results: dict[str, object] = {"num_parameters": num_parameters, "num_bytes": num_bytes}
        results |= {"num_processes": NUM_PROCESSES, "num_rounds": args.rounds}
        for kind, measured in rounds.items():
            results[kind] = {
                "seconds_training_waits": min(max(one["training_waits"]) for one in measured),
                "seconds_until_complete": min(max(one["complete_after"]) for one in measured),
                "extra_mib_of_main_process": min(one["extra_mib"][0] for one in measured),
                "extra_mib_of_any_other": min(max(one["extra_mib"][1:]) for one in measured),
            }
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(name)
    accelerator.free_memory()
    accelerator.end_training()


def fresh_peak() -> int:
    """The memory of this process in KiB, after freed memory went back to the system; its peak counts from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
