"""Benchmark training, memory and decoding beside transformers' GPT-2 and Llama of the same shape, in one run.

    python recipes/benchmark.py --output_dir out/benchmark
    python recipes/benchmark.py --measure decoding --num_key_value_heads 2
    python recipes/benchmark.py --measure scaling --output_dir out/scaling
    python recipes/benchmark.py --measure time_to_quality --dataset literature.txt
    accelerate launch --mixed_precision bf16 recipes/benchmark.py --hidden_size 768 --num_hidden_layers 12 \\
        --num_attention_heads 12 --block_size 1024 --vocab_size 50304 --torch_compile --document_tokens 400
    python recipes/benchmark.py --tokenizer out/tokenizer --dataset stdlib

The models take turns, so that changes of the machine's speed affect all of them; the ratios are medians over those
turns. On a CPU, pretrain.py keeps freed memory (hfllm/training/devices.py) and other trainers do not: each model trains
as its users run it, unless `--keep_freed_memory all` (or none) is given. Memory is the peak of training steps, measured
in a separate process for each model. Decoding is greedy, one row, with the key/value cache, and also measured with
grouped key and value heads. With a tokenizer, the data path is measured too: encoding on one core, and reading a batch.

`--document_tokens` also trains our model on rows of packed documents, which do not see each other. `--nanochat` names
a checkout of nanochat, whose own step (its model of this shape with full attention, its optimizer) is measured beside.

`--measure scaling` measures the time per token by size of the model and by context. `--measure time_to_quality` runs
the commands of pretrain_time_to_quality.yaml on a text, and recipes/baseline.py beside them, imports included.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data import load_corpus, prepare_rows, rows_of_step, split_documents
from hfllm.model import GPTConfig, GPTForCausalLM
from hfllm.report.benchmark import benchmark_table, plot_benchmark, plot_scaling
from hfllm.runs.files import open_output_dir, write_json, write_text
from hfllm.tokenization import document_encoder, load_tokenizer, tokenizer_fingerprint
from hfllm.training.devices import choose_attention, keep_freed_memory
from hfllm.training.footprint import training_memory
from hfllm.training.optimization import build_adamw, build_muon
from hfllm.training.throughput import (
    compile_model,
    data_sheet_flops,
    flops_per_token,
    loss_options,
    peak_flops,
    synchronize,
)

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


@arguments
class BenchmarkArguments(
    groups.Dataset,
    groups.Tokenizer,
    groups.VocabSize,
    groups.BlockSize,
    groups.Shape,
    groups.Compile,
    groups.Precision,
    groups.TrainBatch,
    groups.OutputDir,
    groups.Config,
):
    dataset = differs(help="Text for the data path; a text file for time_to_quality.")
    tokenizer = differs(None, help="Also measure the data path with this tokenizer.")
    vocab_size = differs(8192)
    block_size = differs(256, help="Tokens per row.")
    num_key_value_heads = differs(2, help="Key and value heads of the model with grouped heads, for decoding.")
    torch_compile = differs(help="Compile each model, for measure training; the time to compile is not counted.")
    per_device_train_batch_size = differs(help="Rows per step.")
    measure: Literal["all", "training", "memory", "decoding", "scaling", "time_to_quality"] = option(
        "all", help="What to measure; all is training, memory and decoding."
    )
    num_steps: int = option(10, help="Measured steps, and continuations, of each model.", at_least=1)
    num_prompt_tokens: int = option(32, help="Tokens of the prompt that is continued.", at_least=1)
    num_new_tokens: int = option(128, help="Tokens of each continuation.", at_least=1)
    num_prompts: int = option(1, help="Rows that are continued at a time.", at_least=1)
    cache_implementation: str | None = option(
        None, help="The cache of decoding by transformers' name; static is compiled on a GPU.", default_is="dynamic"
    )
    document_tokens: int = option(
        0, help="Also train on rows of packed documents of this many tokens on average; 0: do not.", at_least=0
    )
    nanochat: str | None = option(None, help="A checkout of nanochat to measure beside, on a GPU.")
    keep_freed_memory: Literal["ours", "all", "none"] = option(
        "ours", help="Models for which a CPU keeps freed memory for the next step."
    )
    scaling_depths: list[int] = option(
        default_factory=lambda: [1, 2, 4, 6, 8], help="Numbers of blocks to measure, with 64 channels each.", at_least=1
    )
    scaling_contexts: list[int] = option(
        default_factory=lambda: [64, 128, 256, 512, 1024], help="Contexts to measure, in tokens.", at_least=1
    )
    output_dir = differs(help="Folder of numbers, table and pictures.", default_is="nothing is written")

    def check(self) -> None:
        """Reject what cannot be measured or would be ignored."""
        check_numbers(self)
        for name in ("torch_compile", "document_tokens", "nanochat"):
            if getattr(self, name) and self.measure not in ("all", "training"):
                raise ValueError(f"--{name} is for --measure training, not for {self.measure}. Leave it out.")
        if self.nanochat is not None and not (Path(self.nanochat) / "nanochat" / "gpt.py").exists():
            raise ValueError(
                f"--nanochat {self.nanochat}: there is no nanochat/gpt.py in it. Give a checkout's folder."
            )
        if self.measure != "time_to_quality":
            return
        defaults = dataclasses.asdict(BenchmarkArguments())
        own = ("measure", "dataset", "output_dir", "config")
        if others := [name for name, value in defaults.items() if name not in own and getattr(self, name) != value]:
            raise ValueError(
                f"--{', --'.join(others)}: --measure time_to_quality runs the commands of "
                "pretrain_time_to_quality.yaml unchanged. Leave them out."
            )
        if self.dataset == "stdlib":
            raise ValueError("--measure time_to_quality is for a text of about a megabyte: give it as --dataset.")


def main(args: BenchmarkArguments) -> None:
    args.check()
    if args.output_dir is not None:
        open_output_dir(args.output_dir)
    if args.measure == "time_to_quality":
        save(args, {"time_to_quality": measure_time_to_quality(args)})
        return
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    peak = peak_flops(device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    machine = f"{name}; it multiplies at {peak / 1e9:,.0f} GFLOP/s in {dtype}"
    print(machine)
    results: dict[str, Any] = {"machine": machine, "peak_flops": peak, "arguments": dataclasses.asdict(args)}
    if args.measure in ("all", "training"):
        results["training"] = measure_training(args, device, dtype, peak)
    if args.measure in ("all", "memory"):
        results["memory"] = measure_memory(args, device, dtype)
    if args.measure in ("all", "decoding"):
        results["decoding"] = measure_decoding(args, device, dtype)
    if args.measure == "scaling":
        results["scaling"] = measure_scaling(args, device, dtype)
    if args.tokenizer is not None:
        results["data"] = measure_data(args)
    save(args, results)


def save(args: BenchmarkArguments, results: dict[str, Any]) -> None:
    """Write the numbers as JSON, the models as a table, and the pictures."""
    if args.output_dir is None:
        return
    folder = Path(args.output_dir)
    write_json(folder / "benchmark.json", results)
    shape = f"{args.num_hidden_layers} layers of {args.hidden_size}, vocabulary {args.vocab_size:,}"
    if "scaling" in results:
        plot_scaling(results["scaling"], folder / "scaling.png", title=f"What a token costs: {results['machine']}")
    elif "machine" in results:
        title = f"{shape}, context {args.block_size}, {args.per_device_train_batch_size} rows; {results['machine']}"
        write_text(folder / "benchmark.md", f"{title}\n\n{benchmark_table(results)}")
        plot_benchmark(results, folder / "benchmark.png", title=title.replace("; it", ";\nit"))
    print(f"\nWritten into {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def build_models(args: BenchmarkArguments) -> dict[str, PreTrainedModel]:
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": args.block_size,
    }
    # On a CPU, dropout on the attention weights prevents the fast attention kernel, so GPT-2 also runs without it.
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ours_without = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    modern = GPTConfig.from_preset("modern", **sizes)
    llama = LlamaConfig(**sizes, intermediate_size=modern.intermediate_size, tie_word_embeddings=True)
    return {
        "transformers GPT-2": GPT2LMHeadModel(GPT2Config(**sizes, **ids)),
        "transformers GPT-2, no dropout": GPT2LMHeadModel(GPT2Config(**sizes, **ids, **no_dropout)),
        "transformers Llama": LlamaForCausalLM(llama),
        "hfllm, book": GPTForCausalLM(GPTConfig.from_preset("book", **sizes, **ours_without)),
        "hfllm, modern": GPTForCausalLM(modern),
    }


QUEUED_STEPS = 5  # that an accelerator takes before its clock is read; in training, Python waits when it logs


def training_step(
    model: PreTrainedModel,
    *,
    num_rows: int,
    block_size: int,
    dtype: torch.dtype,
    torch_compile: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    document_tokens: int = 0,
) -> Callable[[], float]:
    """A function that takes a step, of AdamW by default, each time on the same random rows, and returns its seconds.

    Ours is compiled as pretrain.py compiles it; the others as a whole. With `document_tokens`, documents of one to
    twice as many tokens are packed into the rows, and attention is the one that pretrain.py chooses.
    """
    rates = {"weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
    optimizer = optimizer or build_adamw(model, learning_rate=1e-4, **rates)
    device = model.device
    if document_tokens:
        model.set_attn_implementation(choose_attention(model, device))
    if torch_compile:
        compile_model(model) if isinstance(model, GPTForCausalLM) else model.compile()
    rows = torch.randint(model.config.vocab_size, (num_rows, block_size + 1), device=device)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    batch = {"input_ids": inputs, "labels": inputs, "shift_labels": targets, **loss_options(model)}
    if document_tokens:
        lengths = torch.randint(1, 2 * document_tokens, (num_rows * block_size,))  # more than are needed
        positions = torch.cat([torch.arange(length) for length in lengths[: 1 + inputs.numel() // document_tokens * 2]])
        batch["position_ids"] = positions[: inputs.numel()].view_as(inputs).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, device)


def timed(step: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """A function that takes steps and returns the seconds of one; an accelerator has several queued, as in training."""
    num_steps = 1 if device.type == "cpu" else QUEUED_STEPS

    def take() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / num_steps

    return take


def keeps_freed_memory(args: BenchmarkArguments, name: str) -> bool:
    return {"ours": name.startswith("hfllm"), "all": True, "none": False}[args.keep_freed_memory]


def measure_training(
    args: BenchmarkArguments, device: torch.device, dtype: torch.dtype, peak: float
) -> dict[str, dict[str, Any]]:
    """Forward, backward and AdamW of each model, in turns."""
    models = {name: model.to(device).train() for name, model in build_models(args).items()}
    batch = {"num_rows": args.per_device_train_batch_size, "block_size": args.block_size}
    options = {**batch, "dtype": dtype, "torch_compile": args.torch_compile}
    steps = {name: training_step(model, **options) for name, model in models.items()}
    ours = models["hfllm, modern"].config
    if args.document_tokens:
        models["hfllm, packed"] = GPTForCausalLM(ours).to(device).train()
        steps["hfllm, packed"] = training_step(models["hfllm, packed"], **options, document_tokens=args.document_tokens)
    if args.nanochat is not None:
        models["hfllm, Muon"] = model = GPTForCausalLM(ours).to(device).train()
        rates = {"learning_rate": 0.02, "adam_learning_rate": 0.001, "weight_decay": 0.1, "betas": (0.9, 0.95)}
        muon = build_muon(model, **rates, epsilon=1e-8, momentum=0.85)
        steps["hfllm, Muon"] = training_step(model, **options, optimizer=muon)
        models["nanochat"], steps["nanochat"] = nanochat_step(args, device)
    for step in steps.values():
        step()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.num_steps):
        for name, step in steps.items():
            if device.type == "cpu":
                keep_freed_memory(keeps_freed_memory(args, name))
            step()  # allocates its own memory again after the model before
            seconds[name].append(step())

    first = next(iter(models))
    print(f"\n{'training step':34s} {'tokens/s':>10s} {'of the peak':>12s} {'against ' + first:>28s}")
    tokens_per_step = args.per_device_train_batch_size * args.block_size
    results = {}
    for name, model in models.items():
        median = statistics.median(seconds[name])
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[first], seconds[name], strict=True))
        flops = model.estimate_flops() if name == "nanochat" else flops_per_token(model, block_size=args.block_size)
        mfu = flops * tokens_per_step / median / peak
        results[name] = {
            "tokens_per_second": tokens_per_step / median,
            "seconds_per_step": median,
            "fastest_seconds_per_step": min(seconds[name]),
            "mfu": mfu,
            f"speed_against_{first}": ratio,
        }
        if (sheet := data_sheet_flops(device, dtype)) is not None:
            results[name]["mfu_by_data_sheet"] = mfu * peak / sheet
        print(f"{name:34s} {tokens_per_step / median:10,.0f} {mfu:12.0%} {ratio:28.2f}")
    return results


def nanochat_step(args: BenchmarkArguments, device: torch.device) -> tuple[torch.nn.Module, Callable[[], float]]:
    """nanochat's model of this shape, and a function that takes its own compiled step and returns its seconds."""
    sys.path.insert(0, str(args.nanochat))
    from nanochat.gpt import GPT
    from nanochat.gpt import GPTConfig as NanochatConfig

    heads = {"n_head": args.num_attention_heads, "n_kv_head": args.num_attention_heads}
    shape = {"n_layer": args.num_hidden_layers, "n_embd": args.hidden_size, **heads}
    with torch.device("meta"):
        model = GPT(
            NanochatConfig(sequence_len=args.block_size, vocab_size=args.vocab_size, window_pattern="L", **shape)
        )
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled = torch.compile(model, dynamic=False)
    rows = torch.randint(args.vocab_size, (args.per_device_train_batch_size, args.block_size + 1), device=device)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> None:
        compiled(inputs, targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return model, timed(step, device)


def measure_memory(args: BenchmarkArguments, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The peak memory of each model's training, from weights to activations, in a separate process."""
    batch = {"num_rows": args.per_device_train_batch_size, "block_size": args.block_size}
    print(f"\n{'memory of training':34s} {'at most':>14s} {'weights alone':>14s}")
    results = {}
    for name, model in build_models(args).items():
        keeps = keeps_freed_memory(args, name)
        num_bytes = training_memory(model.config, **batch, dtype=dtype, keeps_freed_memory=keeps)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        results[name] = {"bytes": num_bytes, "weight_bytes": weights}
        print(f"{name:34s} {num_bytes / 2**20:10,.0f} MiB {weights / 2**20:10,.0f} MiB")
    return results


@torch.no_grad()
def measure_decoding(args: BenchmarkArguments, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Greedy continuations of one row by each model, in turns, and the final size of the cache."""
    num_tokens = args.num_prompt_tokens + args.num_new_tokens
    args = dataclasses.replace(args, block_size=max(args.block_size, num_tokens))
    models = build_models(args)
    del models["transformers GPT-2"]  # without training, dropout makes no difference
    grouped = GPTConfig(**{**models["hfllm, modern"].config.to_dict(), "num_key_value_heads": args.num_key_value_heads})
    models[f"hfllm, modern, {args.num_key_value_heads} key/value heads"] = GPTForCausalLM(grouped)
    for model in models.values():
        model.to(device, dtype).eval()
        model.generation_config.eos_token_id = None  # all of them write to the end
    prompt = torch.randint(args.vocab_size, (args.num_prompts, args.num_prompt_tokens), device=device)

    def continue_prompt(model: PreTrainedModel) -> tuple[float, int]:
        start = time.perf_counter()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.num_new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            cache_implementation=args.cache_implementation,
        )
        output.sequences[0, -1].item()  # waits for an accelerator
        seconds = time.perf_counter() - start
        assert output.sequences.shape[1] == num_tokens
        return seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)

    cache_bytes = {name: continue_prompt(model)[1] for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.num_steps):
        for name, model in models.items():
            seconds[name].append(continue_prompt(model)[0])

    first, second = list(models)[:2]
    print(f"\n{f'decoding, {num_tokens} tokens':34s} {'tokens/s':>10s} {'cache':>12s} {'against GPT-2, Llama':>28s}")
    results = {}
    for name in models:
        median = statistics.median(seconds[name])
        against = [
            statistics.median(theirs / ours for theirs, ours in zip(seconds[other], seconds[name], strict=True))
            for other in (first, second)
        ]
        results[name] = {
            "tokens_per_second": args.num_prompts * args.num_new_tokens / median,
            "cache_bytes": cache_bytes[name],
            f"speed_against_{first}": against[0],
            f"speed_against_{second}": against[1],
        }
        cache = f"{cache_bytes[name] / 2**20:.2f} MiB"
        rate = f"{args.num_prompts * args.num_new_tokens / median:10,.0f}"
        print(f"{name:34s} {rate} {cache:>12s} {against[0]:22.2f} {against[1]:5.2f}")
    return results


DECODING_ROUNDS = 4  # in turns, because the first tokens of the first model are slow


def measure_scaling(args: BenchmarkArguments, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The seconds per token in training and in decoding, for growing models and growing contexts.

    Each is the fastest of several steps or tokens, because other work on the machine varies between points.
    """
    names = ("hfllm, modern", "transformers Llama", "transformers GPT-2, no dropout")
    shapes = [{"num_hidden_layers": depth, "hidden_size": 64 * depth} for depth in args.scaling_depths]
    sizes = [("num_parameters", {**shape, "num_attention_heads": shape["num_hidden_layers"]}) for shape in shapes]
    contexts = [("context", {"block_size": context}) for context in args.scaling_contexts]
    points = []
    print(f"\n{'microseconds of a token':34s} {'parameters':>12s} {'context':>8s} {'training':>10s} {'decoding':>10s}")
    for axis, change in (*sizes, *contexts):
        shape = dataclasses.replace(args, **change)
        models = {name: model.to(device) for name, model in build_models(shape).items() if name in names}
        place = {"axis": axis, "context": shape.block_size}
        measured = {name: {"model": name, **place, "num_parameters": models[name].num_parameters()} for name in names}
        for name, model in models.items():
            if device.type == "cpu":
                keep_freed_memory(keeps_freed_memory(args, name))
            num_rows = max(1, 1024 // shape.block_size)
            step = training_step(model.train(), num_rows=num_rows, block_size=shape.block_size, dtype=dtype)
            seconds = min([step() for _ in range(args.num_steps + 1)][1:])
            measured[name]["training_seconds_per_token"] = seconds / (num_rows * shape.block_size)
        decoding: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(DECODING_ROUNDS):
            for name, model in models.items():
                decoding[name].append(decoding_seconds(model.to(dtype).eval(), context=shape.block_size))
        for name, point in measured.items():
            point["decoding_seconds_per_token"] = min(decoding[name])
            times = (1e6 * point[f"{kind}_seconds_per_token"] for kind in ("training", "decoding"))
            size = f"{point['num_parameters']:12,} {point['context']:8,}"
            print(f"{name:34s} {size}", *(f"{each:10,.0f}" for each in times))
            points.append(point)
    return points


@torch.no_grad()
def decoding_seconds(model: PreTrainedModel, *, context: int, num_tokens: int = 16) -> float:
    """The seconds of the fastest of a context's last `num_tokens` tokens, one row with the key/value cache."""
    ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
    start = max(1, context - num_tokens)
    output = model(ids[:, :start], use_cache=True, logits_to_keep=1)
    seconds = []
    for index in range(start, context):
        begin = time.perf_counter()
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        output.logits[0, -1].argmax().item()  # waits for an accelerator
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def measure_time_to_quality(args: BenchmarkArguments) -> dict[str, dict[str, float]]:
    """The wall time of whole commands from a text to a model, and its bits per byte on held-out text."""
    recipes = Path(__file__).parent
    config = recipes / "configs" / "pretrain_time_to_quality.yaml"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = ["--dataset", args.dataset]
        ours = [*text, "--cache_dir", str(place / "cache")]  # an empty one: earlier runs must not help
        tokenizer = [str(recipes / "train_tokenizer.py"), *ours, "--vocab_size", "2048"]
        pretrain = [str(recipes / "pretrain.py"), *ours, "--config", str(config), "--tokenizer", f"{place}/tokenizer"]
        seconds = {
            "tokenizer": run_timed([sys.executable, *tokenizer, "--output_dir", f"{place}/tokenizer"]),
            "pretraining": run_timed([sys.executable, *pretrain, "--output_dir", f"{place}/ours"]),
            "baseline": run_timed(
                [sys.executable, str(recipes / "baseline.py"), *text, "--output_dir", f"{place}/baseline"]
            ),
        }
        bits = {
            name: json.loads((place / name / "metrics.json").read_text(encoding="utf-8"))["eval_bits_per_byte"]
            for name in ("ours", "baseline")
        }
    total = seconds["tokenizer"] + seconds["pretraining"]
    print(
        f"hfllm: {total:.1f} s, of which the tokenizer {seconds['tokenizer']:.1f} s and pretraining "
        f"{seconds['pretraining']:.1f} s, to {bits['ours']:.3f} bits per byte\n"
        f"transformers' Trainer, GPT-2 on characters: {seconds['baseline']:.1f} s to {bits['baseline']:.3f} bits per "
        f"byte, {seconds['baseline'] / total:.1f} times as long"
    )
    return {"seconds": seconds, "eval_bits_per_byte": bits}


def run_timed(command: list[str]) -> float:
    """The seconds of a command, imports included; if it fails, the benchmark stops with its output."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return time.perf_counter() - start


def measure_data(args: BenchmarkArguments) -> dict[str, float]:
    """Encoding in MB/s on one core, and reading a batch of rows in milliseconds."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the Rust side first starts its threads
    tokenizer = load_tokenizer(args.tokenizer)
    encode = document_encoder(tokenizer)
    corpus = load_corpus(args.dataset)
    texts = corpus.documents[: min(400, len(corpus.documents))]["text"]
    num_bytes = sum(len(text.encode()) for text in texts)
    encode(texts[:8])
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        encode(texts)
        rates.append(num_bytes / 1e6 / (time.perf_counter() - start))

    documents, _ = split_documents(corpus, validation_fraction=0.02)
    rows = prepare_rows(
        documents,
        encode,
        block_size=args.block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
        key=f"benchmark {corpus.fingerprint} {tokenizer_fingerprint(tokenizer)}",
    )
    order = {"rows_per_step": args.per_device_train_batch_size, "num_rows": len(rows), "seed": 0}
    seconds = []
    for index in range(200):
        start = time.perf_counter()
        [batch_rows] = rows_of_step(index, **order)
        rows.batch(batch_rows)
        seconds.append(time.perf_counter() - start)
    batch = float(np.median(seconds))
    print(f"\nencoding: {max(rates):.2f} MB/s on one core ({num_bytes:,} bytes)")
    print(f"reading a batch: {1e3 * batch:.3f} ms")
    return {"encode_megabytes_per_second_per_core": max(rates), "seconds_per_batch": batch}


if __name__ == "__main__":
    run(main, BenchmarkArguments, description=__doc__)
