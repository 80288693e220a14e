"""Descriptions of a pretraining run before it starts and after it ends, and its final metrics."""

import shlex
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..evaluation.rows import Evaluation
from .devices import describe_sharding, dtype_of
from .throughput import data_sheet_flops, multiplies_fast, peak_flops, peak_memory_bytes, share_of_peak


def describe_run(
    model: PreTrainedModel,
    *,
    accelerator: Accelerator,
    max_steps: int,
    rows_per_step: int,
    block_size: int,
    num_rows: int | None,
) -> str:
    """The model's size, the tokens of a step and the devices; `num_rows` is None for a stream."""
    num_embedding = model.get_input_embeddings().weight.numel()
    tied = "tied to the head" if model.config.tie_word_embeddings else "beside a head of the same size"
    passes = "a stream of rows"
    if num_rows is not None:
        passes = f"{max_steps * rows_per_step / num_rows:.2f} passes over {num_rows:,} rows"
    sharding = f" ({kind})" if (kind := describe_sharding(accelerator)) else ""
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    return (
        f"Model: {model.num_parameters():,} parameters, of which {num_embedding:,} in the token embedding, {tied}.\n"
        f"Training: {max_steps:,} steps of {rows_per_step * block_size:,} tokens ({rows_per_step} rows of "
        f"{block_size}), {passes}, on {accelerator.num_processes} x {accelerator.device.type}{sharding} in "
        f"{precision}, attention by {model.config._attn_implementation}.{_describe_faster_precision(accelerator)}"
    )


def _describe_faster_precision(accelerator: Accelerator) -> str:
    """A hint for a CPU that could train in bfloat16."""
    is_cpu_in_float32 = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    if not is_cpu_in_float32 or not multiplies_fast(accelerator.device, torch.bfloat16):
        return ""
    return (
        "\nThis CPU also has instructions for bfloat16, which are faster: use accelerate launch --mixed_precision bf16."
    )


def final_metrics(
    state: dict[str, Any],
    *,
    accelerator: Accelerator,
    num_parameters: int,
    flops_per_token: int,
    tokens_per_second: float | None,
) -> dict[str, Any]:
    """The numbers of `metrics.json`: loss, tokens, time, speed, the share of the machine's peak, and memory.

    `state` has the loop's counts and the evaluation of the saved model. The peak is measured in the dtype in which the
    run computes; if the device has no fast products in it, peak and share are None (see `share_of_peak`).
    """
    result = Evaluation(**state["evaluation"])
    dtype = dtype_of(accelerator)
    peak = peak_flops(accelerator.device, dtype) if multiplies_fast(accelerator.device, dtype) else None
    sheet = data_sheet_flops(accelerator.device, dtype)
    flops_per_second = tokens_per_second and tokens_per_second * flops_per_token / accelerator.num_processes
    return {
        "eval_loss": result.loss,
        "eval_perplexity": result.perplexity,
        "eval_bits_per_byte": result.bits_per_byte,
        "eval_tokens": result.num_tokens,
        "eval_bytes": result.num_bytes,
        "train_steps": state["step"],
        "train_tokens": state["train_tokens"],
        "train_seconds": round(state["seconds"], 1),
        "save_seconds": round(state["save_seconds"], 2),
        "skipped_updates": state["skipped_updates"],
        "tokens_per_second": tokens_per_second,
        "mfu": flops_per_second and share_of_peak(flops_per_second, peak),
        "mfu_by_data_sheet": flops_per_second and share_of_peak(flops_per_second, sheet),
        "peak_flops_per_device": peak,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "num_parameters": num_parameters,
    }


def describe_result(output_dir: Path, metrics: dict[str, Any], *, prompt: str) -> str:
    """The result of a pretraining run, the files it wrote, and what to do next."""
    speed = ""
    if metrics["tokens_per_second"]:
        speed = f" at {metrics['tokens_per_second']:,.0f} tokens/s"
    if metrics["mfu"]:
        speed += f", {metrics['mfu']:.0%} of the machine's peak"
    size = f"{metrics['num_parameters']:,} parameters"
    best = f", at step {metrics['best_step']:,}, whose model is saved" if "best_step" in metrics else ""
    return f"""
{metrics["train_tokens"]:,} tokens in {metrics["train_seconds"] / 60:.1f} minutes{speed}.
Validation: {metrics["eval_loss"]:.4f} nats per token, {metrics["eval_bits_per_byte"]:.4f} bits per byte{best}.

{output_dir}/model.safetensors   the model, {size}, with its tokenizer and code beside it
{output_dir}/report.html         the run's page: curves, samples, numbers, arguments; open it in a browser
{output_dir}/README.md           the model card, for the Hub: recipes/push_to_hub.py
{output_dir}/checkpoints         to resume from, with a larger --max_steps

Next, let it write:
    python recipes/generate.py --model {shlex.quote(str(output_dir))} --prompt {shlex.quote(prompt)}
or open it in Python:
    import hfllm; from transformers import pipeline
    pipeline("text-generation", {str(output_dir)!r})({prompt!r})"""
