"""Measure one group of numbers of the documentation, and write it with its conditions to docs/measurements/NAME.json.

    python docs/measurements/measure.py demo --other_dataset another-language.jsonl
    python docs/measurements/measure.py time_to_quality --other_dataset novel.txt --dataset literature.txt
    python docs/measurements/measure.py training_step
    python docs/measurements/measure.py decoding
    python docs/measurements/measure.py sms --dataset SMSSpamCollection
    python docs/measurements/measure.py docstrings
    python docs/measurements/measure.py scaling
    python docs/measurements/measure.py book --dataset the-verdict.txt --tokenizer openai-community/gpt2
    python docs/measurements/measure.py instruction_throughput
    python docs/measurements/measure.py muon_processes

Then `python docs/measurements/tables.py` puts the numbers into README.md and docs/numbers.md. Run it in the project's
environment, from the repository's root, on a machine that does nothing else. The numbers are those that the recipes
write themselves (metrics.json, log.jsonl, benchmark.json); this script starts the recipes and adds date, commit and
hardware. `sms`, `docstrings` and `instruction_throughput` start from the demo's model, so measure `demo` first.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hfllm.report.environment import describe_environment
from hfllm.runs.log import read_log


ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
SEEDS = range(5)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml"]
QUESTIONS = ("What does Python print for [14, 15, 6, 2, 10][1]", "What does Python print for 'tiger'.startswith('ti')")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MEASUREMENTS))
    parser.add_argument("--dataset", help="the text of time_to_quality and book, or the messages of sms")
    parser.add_argument("--other_dataset", help="for time_to_quality and demo: a text that no setting was chosen on")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="for book")
    parser.add_argument("--model", default="out/demo", help="for sms, docstrings and instruction_throughput")
    options = parser.parse_args()
    needed = {"time_to_quality": ("other_dataset",), "sms": ("dataset",), "book": ("dataset",)}
    if missing := [f"--{name}" for name in needed.get(options.name, ()) if getattr(options, name) is None]:
        parser.error(f"{options.name} needs {' and '.join(missing)}.")
    started = time.time()
    results = MEASUREMENTS[options.name](options)
    command = f"python docs/measurements/measure.py {shlex.join(without_folders(sys.argv[1:]))}"
    measured = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": run(["git", "rev-parse", "--short", "HEAD"]).strip(),
        "seconds": round(time.time() - started),
        "environment": describe_environment(),
    }
    path = FOLDER / f"{options.name}.json"
    path.write_text(json.dumps({"measured": measured, "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {path.relative_to(ROOT)}. Next: python docs/measurements/tables.py")


def measure_demo(options: argparse.Namespace) -> dict[str, Any]:
    """`make demo` from nothing but its environment: the time of each stage, what it prints, and its numbers."""
    for name in ("tokenizer", "demo", "classifier", "chat"):
        if (ROOT / "out" / name).exists():
            sys.exit(f"error: out/{name} exists, so `make demo` would resume it. Move out/ away first.")
    run(["make", "install"])
    printed, seconds = stream_demo()
    files = {"tokenizer": "tokenizer_report.json"} | dict.fromkeys(("demo", "classifier", "chat"), "metrics.json")
    results = {
        name: json.loads((ROOT / "out" / name / file).read_text(encoding="utf-8")) for name, file in files.items()
    }
    halfway = [entry for entry in read_log(ROOT / "out" / "demo" / "log.jsonl") if "eval_bits_per_byte" in entry]
    chat = [sys.executable, "recipes/chat.py", "--model", "out/chat"]
    if options.other_dataset is not None:
        results["other"] = pretrain_elsewhere(options.other_dataset)
    return {
        "seconds": seconds,
        "halfway_bits_per_byte": halfway[len(halfway) // 2]["eval_bits_per_byte"],
        **results,
        "replies": {question: run(chat, stdin=question + "\n").strip() for question in QUESTIONS},
        "printed": printed,
    }


def pretrain_elsewhere(dataset: str) -> dict[str, Any]:
    """The demo's tokenizer and pretraining, by its own commands, on another text."""
    commands = [line for line in run(["make", "--dry-run", "demo"]).splitlines() if " recipes/" in line]
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        text = ["--dataset", dataset, "--cache_dir", f"{folder}/cache"]
        run([*shlex.split(commands[0]), *text, "--output_dir", f"{folder}/tokenizer"])
        run([*shlex.split(commands[1]), *text, "--tokenizer", f"{folder}/tokenizer", "--output_dir", f"{folder}/demo"])
        metrics = json.loads(Path(folder, "demo", "metrics.json").read_text(encoding="utf-8"))
    metrics |= {"dataset": Path(dataset).name, "bytes": Path(dataset).stat().st_size}
    return {**metrics, "seconds": time.time() - started}


def stream_demo() -> tuple[list[str], dict[str, float]]:
    """The lines that `make demo` prints, and the seconds of each recipe, which begins where make prints its command."""
    lines, starts = [], [("", time.perf_counter())]
    with subprocess.Popen(["make", "demo"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
            if command := re.match(r"\S*bin/(?:python|accelerate launch .*) recipes/(\w+)\.py ", line):
                starts.append((command[1], time.perf_counter()))
    if process.returncode != 0:
        sys.exit(f"error: make demo ended with exit code {process.returncode}.")
    ends = [start for _, start in starts[2:]] + [time.perf_counter()]
    seconds = {name: end - start for (name, start), end in zip(starts[1:], ends, strict=True)}
    return lines, {**seconds, "all": sum(seconds.values())}


def measure_time_to_quality(options: argparse.Namespace) -> dict[str, Any]:
    """Whole commands beside nanoGPT's configuration, on a text that no setting was chosen on, and on that one."""
    results = {}
    for name, dataset in (("other", options.other_dataset), ("chosen_on", options.dataset)):
        if dataset is None:
            continue
        measured = benchmark("time_to_quality", "--dataset", dataset)["time_to_quality"]
        results[name] = {
            "bytes": Path(dataset).stat().st_size,
            **measured,
            "total_seconds": measured["seconds"]["tokenizer"] + measured["seconds"]["pretraining"],
        }
    return results


def measure_training_step(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "float32": benchmark("training", "--num_steps", "6", launch=LAUNCH),
        "bfloat16": benchmark("training", "--num_steps", "6", launch=[*LAUNCH, "--mixed_precision", "bf16"]),
        "memory": benchmark("memory"),
    }


def measure_decoding(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "one_thread": benchmark("decoding", "--num_steps", "8", OMP_NUM_THREADS="1"),
        "all_threads": benchmark("decoding", "--num_steps", "8"),
    }


def measure_scaling(options: argparse.Namespace) -> dict[str, Any]:
    return benchmark("scaling")


def measure_sms(options: argparse.Namespace) -> dict[str, Any]:
    config = "recipes/configs/classification_sms.yaml"
    smoothing = ["--label_smoothing_factor", "0"]
    own = ["--dataset", options.dataset]
    return {
        "as_configured": classify(options.model, config, *own),
        "without_smoothing": classify(options.model, config, *own, *smoothing),
        "lora_without_smoothing": classify(options.model, config, *own, *smoothing, "--method", "lora"),
        # Published in "Build a Large Language Model (From Scratch)", chapter 6 and appendix E; one split.
        "book": {"gpt2_parameters": 124_000_000, "best_accuracy": 0.9833, "random_weights_accuracy": 0.9367},
    }


def measure_docstrings(options: argparse.Namespace) -> dict[str, Any]:
    return {"as_configured": classify(options.model, "recipes/configs/classification_stdlib.yaml")}


def classify(model: str, config: str, *more: str) -> dict[str, Any]:
    """The test accuracy of five runs, each with its own seed and split, beside TF-IDF on the same splits."""
    metrics = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            place = f"{folder}/{seed}"
            words = ["--config", config, "--model", model, "--seed", str(seed), "--split_seed", str(seed)]
            run([sys.executable, "recipes/finetune_classification.py", *words, *more, "--output_dir", place])
            metrics.append(json.loads(Path(place, "metrics.json").read_text(encoding="utf-8")))
    results: dict[str, Any] = {"num_trained_parameters": metrics[0]["num_trained_parameters"]}
    results["num_test_texts"] = [each["test_texts"] for each in metrics]
    for name, key in (("model", "test_accuracy"), ("tf_idf", "test_logistic_regression_accuracy")):
        values = [each[key] for each in metrics]
        spread = {"mean": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
        results[name] = {"accuracy": values, **spread}
    return results


def measure_book(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", "recipes/configs/pretrain_book.yaml", "--dataset", options.dataset]
        words += ["--tokenizer", options.tokenizer, "--output_dir", folder]
        run([sys.executable, "recipes/pretrain.py", *words])
        keys = ("step", "eval_train_loss", "eval_loss")
        log = [
            {key: entry[key] for key in keys} for entry in read_log(Path(folder, "log.jsonl")) if "eval_loss" in entry
        ]
        return {"evaluations": log, "metrics": json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))}


def measure_instruction_throughput(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "throughput.json")
        script = ["docs/measurements/instruction_throughput.py", "--model", options.model, "--output_file", str(path)]
        run([sys.executable, *script], OMP_NUM_THREADS="1")
        return json.loads(path.read_text(encoding="utf-8"))


def measure_muon_processes(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "muon.json")
        run([sys.executable, "docs/measurements/muon_processes.py", "--output_file", str(path)], OMP_NUM_THREADS="1")
        return json.loads(path.read_text(encoding="utf-8"))


def measure_saves(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saves.json")
        run([sys.executable, "docs/measurements/saves.py", "--output", str(path)])
        return json.loads(path.read_text(encoding="utf-8"))


def benchmark(measure: str, *more: str, launch: list[str] | None = None, **variables: str) -> dict[str, Any]:
    """What recipes/benchmark.py writes into benchmark.json."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--measure", measure, *more, "--output_dir", folder]
        run([*(launch or [sys.executable]), "recipes/benchmark.py", *words], **variables)
        results = json.loads(Path(folder, "benchmark.json").read_text(encoding="utf-8"))
    results.pop("arguments", None)  # they name a temporary folder
    return results


def run(command: list[str], *, stdin: str | None = None, **variables: str) -> str:
    """The standard output of a command; what it says on standard error is shown as it runs."""
    print(f"+ {shlex.join(command)}", file=sys.stderr)
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=stdin, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"error: the command ended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def without_folders(words: list[str]) -> list[str]:
    """The command line without the folders of this machine: a file is named, not located."""
    return [Path(word).name if Path(word).is_absolute() else word for word in words]


MEASUREMENTS = {
    "book": measure_book,
    "decoding": measure_decoding,
    "demo": measure_demo,
    "docstrings": measure_docstrings,
    "instruction_throughput": measure_instruction_throughput,
    "muon_processes": measure_muon_processes,
    "saves": measure_saves,
    "scaling": measure_scaling,
    "sms": measure_sms,
    "time_to_quality": measure_time_to_quality,
    "training_step": measure_training_step,
}


if __name__ == "__main__":
    main()
