"""Chapters 2 to 5: pretrain a GPT from random weights on your own text.

On a laptop, offline, on the source of Python's standard library (about seven minutes on two cores):

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        --config recipes/configs/pretrain_demo.yaml --tokenizer out/tokenizer --output_dir out/demo

On your own text, on one GPU:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/pretrain.py \\
        --config recipes/configs/pretrain_demo.yaml --dataset my.txt --tokenizer out/tokenizer --output_dir out/mine

On the GPUs of one machine, each with the whole model (`ddp.yaml`) or each with a part of it (`fsdp2.yaml`):

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 recipes/pretrain.py \\
        --config recipes/configs/pretrain_demo.yaml --dataset my.txt --tokenizer out/tokenizer --output_dir out/mine

The same command again goes on where the run was interrupted. `--help` explains every option; how many devices, how they
share the work and in which precision is the accelerate file's business alone.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hfllm.arguments import parse_overrides, run, save_arguments
from hfllm.data.inspection import describe_row
from hfllm.data.packing import Rows
from hfllm.data.training_text import TrainingText, prepare_text
from hfllm.model import GPTConfig, GPTForCausalLM
from hfllm.report import append_to_log, plot_curves, read_log
from hfllm.tokenization import document_encoder, load_tokenizer, tokenizer_fingerprint
from hfllm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, save_model
from hfllm.training.devices import clip_gradient, describe_sharding, leaving_at_once, start_accelerator
from hfllm.training.evaluation import Evaluation, evaluate_rows, score_rows
from hfllm.training.interruption import EXIT_CODE, StopRequest
from hfllm.training.lock import run_lock
from hfllm.training.optimization import build_adamw, learning_rate_at
from hfllm.training.rehearsal import rehearse
from hfllm.training.spikes import SpikeDetector
from hfllm.training.throughput import ThroughputMeter, flops_per_token, peak_flops, peak_memory_bytes


@dataclasses.dataclass
class PretrainArguments:
    # Text
    dataset: str = HfArg(default="stdlib", help="A Hub id, a local file or folder, or 'stdlib': this Python's library.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of the Hub dataset.")
    split: str = HfArg(default="train", help="Split of the Hub dataset to train on.")
    validation_split: str | None = HfArg(default=None, help="Split to evaluate on; default: hold documents back.")
    validation_fraction: float = HfArg(default=0.05, help="Share of the bytes held back, by whole documents.")
    text_column: str = HfArg(default="text", help="Column or JSON key of the text.")
    on_bad_record: Literal["error", "skip"] = HfArg(default="error", help="What to do with a record that is broken.")
    tokenizer: str | None = HfArg(
        default=None, help="Folder or Hub id of the tokenizer; default: that of --model, or out/tokenizer."
    )
    block_size: int = HfArg(default=256, help="Tokens per training row; also the longest context the model learns.")
    stride: int | None = HfArg(
        default=None, help="Cut windows of block_size every so many tokens (chapter 2), instead of packing documents."
    )
    cache_dir: str | None = HfArg(default=None, help="Where prepared documents and rows are kept.")
    streaming: bool = HfArg(default=False, help="Read and encode while training, for text larger than the disk.")

    # Model
    model: str | None = HfArg(default=None, help="Folder or Hub id of a model to go on from; default: random weights.")
    preset: Literal["modern", "book"] = HfArg(default="modern", help="'modern' is a Qwen3, 'book' is a GPT-2.")
    num_hidden_layers: int = HfArg(default=6, help="Blocks.")
    hidden_size: int = HfArg(default=384, help="Width of the model.")
    num_attention_heads: int = HfArg(default=6, help="Query heads.")
    num_key_value_heads: int | None = HfArg(default=None, help="Key and value heads; default: as many.")
    config_overrides: list[str] | None = HfArg(
        default=None, help="Further fields of GPTConfig, e.g. attention_bias=false residual_dropout=0.1"
    )

    # Optimization
    max_steps: int | None = HfArg(default=None, help="Optimizer steps; default: num_train_epochs.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the rows, if max_steps is not given.")
    per_device_train_batch_size: int = HfArg(default=8, help="Rows per device and forward pass.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes per optimizer step.")
    learning_rate: float = HfArg(default=1e-3, help="Highest learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = HfArg(
        default="cosine", help="Course of the learning rate after warm-up."
    )
    warmup_steps: int = HfArg(default=0, help="Steps in which the learning rate rises.")
    decay_steps: int | None = HfArg(default=None, help="Steps of warmup_stable_decay's final fall; default: a fifth.")
    min_lr_ratio: float = HfArg(default=0.1, help="The lowest learning rate, as a share of the highest.")
    weight_decay: float = HfArg(default=0.1, help="Decoupled decay of the matrices.")
    adam_beta1: float = HfArg(default=0.9, help="Decay of AdamW's mean.")
    adam_beta2: float = HfArg(default=0.95, help="Decay of AdamW's variance.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW's epsilon.")
    max_grad_norm: float = HfArg(default=1.0, help="Longest gradient, by its global norm; 0 does not clip.")
    skip_spikes: float | None = HfArg(
        default=None, help="Skip updates whose loss or gradient is so many standard deviations above the last 128."
    )
    seed: int = HfArg(default=42, help="Of the initial weights, the order of rows and dropout.")
    torch_compile: bool = HfArg(default=False, help="Compile the blocks: slower to start, faster to train.")

    # What is written, and when
    output_dir: str = HfArg(default="out/pretrain", help="The run's folder. A run that stands there goes on.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete the run that stands there and start anew.")
    dry_run: bool = HfArg(default=False, help="Check and compute everything, take a few steps, tell, write nothing.")
    logging_steps: int = HfArg(default=10, help="Steps between two lines of log.jsonl.")
    eval_steps: int = HfArg(default=100, help="Steps between two evaluations.")
    per_device_eval_batch_size: int = HfArg(default=16, help="Rows per device in evaluation.")
    eval_train_rows: int = HfArg(default=0, help="Also evaluate on so many training rows, without dropout.")
    save_steps: int = HfArg(default=200, help="Steps between two checkpoints.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept.")
    sample_prompt: str = HfArg(default="", help="What the samples begin with; default: the start of a document.")
    sample_tokens: int = HfArg(default=64, help="Tokens of the sample after each evaluation; 0: none.")
    report_to: list[str] | None = HfArg(default=None, help="Trackers, by accelerate's names: tensorboard trackio wandb")
    config: str | None = HfArg(default=None, help="A YAML file of these options.")

    def check(self) -> None:
        """Stop at the door what is wrong whatever the text and the tokenizer are."""
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        for name in (*counts, "block_size", "logging_steps", "eval_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give at least 1.")
        if self.streaming and self.max_steps is None:
            raise ValueError("A stream has no end that is known beforehand: with --streaming give --max_steps.")
        if self.streaming and self.stride is not None:
            raise ValueError(
                "--stride cuts prepared documents into windows; a stream is packed. Leave one of them out."
            )
        if self.skip_spikes is not None:
            SpikeDetector(self.skip_spikes)
        if self.max_steps is not None:
            self.learning_rate_at(0, self.max_steps)

    def learning_rate_at(self, step: int, max_steps: int) -> float:
        return learning_rate_at(
            step,
            learning_rate=self.learning_rate,
            max_steps=max_steps,
            warmup_steps=self.warmup_steps,
            schedule=self.lr_scheduler_type,
            min_lr_ratio=self.min_lr_ratio,
            decay_steps=self.decay_steps,
        )


# A resumed run is the same run only with the same of these (and the same data, tokenizer and model).
FIXED_ARGUMENTS = ("block_size", "stride", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "decay_steps")
FIXED_ARGUMENTS += ("min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
FIXED_ARGUMENTS += ("skip_spikes",)
SHAPE_ARGUMENTS = ("preset", "num_hidden_layers", "hidden_size", "num_attention_heads")
SHAPE_ARGUMENTS += ("num_key_value_heads", "config_overrides")
MAX_SKIPPED_IN_A_ROW = 10  # updates whose gradient was not finite; after so many it is no accident


TEXT_ARGUMENTS = ("dataset_config", "split", "validation_split", "validation_fraction", "text_column")
TEXT_ARGUMENTS += ("on_bad_record", "block_size", "stride", "cache_dir", "streaming", "seed")


def main(args: PretrainArguments) -> None:
    args.check()
    output_dir = Path(args.output_dir)

    # 1. Devices: how many processes there are, and what they share, is what `accelerate launch` was told.
    accelerator = start_accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        max_grad_norm=args.max_grad_norm,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    if args.skip_spikes is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "--skip_spikes decides between the gradient and the update, and DeepSpeed takes both at once. Leave it "
            "out, or shard with accelerate_configs/fsdp2.yaml."
        )
    lock = contextlib.nullcontext() if args.dry_run else run_lock(output_dir, accelerator=accelerator)
    with leaving_at_once(accelerator), lock, StopRequest(accelerator) as stop_request:
        if args.overwrite_output_dir and not args.dry_run:
            delete_earlier_run(output_dir, accelerator)
        elif (
            not args.overwrite_output_dir
            and (output_dir / "config.json").exists()
            and not (output_dir / "arguments.yaml").exists()
        ):
            raise ValueError(
                f"{output_dir} holds a model that no run of this recipe made, and would be overwritten. Choose another "
                "--output_dir, or overwrite it with --overwrite_output_dir."
            )

        # 2. The tokenizer and the model's shape: what cannot work together stops here, before the work starts.
        tokenizer = load_tokenizer(args.tokenizer or args.model or "out/tokenizer")
        config = build_config(args, tokenizer)

        # 3. Text to rows
        text = load_text(args, tokenizer, accelerator)
        accelerator.print(text.summary)
        max_steps = args.max_steps
        if max_steps is None:
            max_steps = math.ceil(args.num_train_epochs * len(text.train) / rows_per_step(args, accelerator))
        args.learning_rate_at(0, max_steps)  # a schedule that does not fit stops here

        # 4. Random weights, or those of --model
        torch.manual_seed(args.seed)
        model = build_model(args, config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = flops_per_token(model, block_size=args.block_size)
        describe(args, accelerator, model, text, max_steps)

        # 5. The optimizer, and what model and optimizer become on these devices
        optimizer = build_adamw(
            model,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            epsilon=args.adam_epsilon,
        )
        model, optimizer = accelerator.prepare(model, optimizer)

        if args.dry_run:
            rehearse_run(args, accelerator, model, optimizer, text, max_steps)
            is_finished = True
        else:
            # 6. Where this folder's run stopped, or the beginning
            state = find_state(args, accelerator, model, optimizer, text, identify(args, accelerator, config, text))

            # 7. The loop, and at its end the model as everybody's tools open it, with the numbers
            is_finished = state["step"] >= max_steps and (output_dir / "metrics.json").exists()
            if is_finished:
                accelerator.print(f"The run in {output_dir} ended at step {state['step']:,}: nothing to do.")
            else:
                accelerator.init_trackers("hfllm", config={name: str(value) for name, value in vars(args).items()})
                if accelerator.is_main_process:
                    save_arguments(args, output_dir / "arguments.yaml")
                    tokenizer.save_pretrained(output_dir)
                throughput = train(args, accelerator, model, optimizer, text, state, max_steps, stop_request)
                is_finished = state["step"] >= max_steps
                if is_finished:
                    finish(args, accelerator, model, text, state, throughput, flops, num_parameters)

    text.close()
    # DDP has to let go of the process group before it is destroyed: the other way round, gloo waits for Python's lock
    # while Python waits for gloo, and now and then a process never ends.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    if not is_finished:
        accelerator.print(f"Stopped at step {state['step']:,} of {max_steps:,}; the same command goes on from here.")
        sys.exit(EXIT_CODE)


def train(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: TrainingText,
    state: dict,
    max_steps: int,
    stop_request: StopRequest,
) -> float | None:
    """Take the steps from `state["step"]` to `max_steps`, with `state` kept up to date; returns tokens per second."""
    detector = SpikeDetector(args.skip_spikes, history=state.get("spike_history")) if args.skip_spikes else None
    cut = cut_of_step(args, accelerator)
    interval_nats = torch.zeros((), device=accelerator.device)
    interval_targets = num_skipped_in_a_row = 0
    meter = ThroughputMeter(accelerator.device)
    if state["step"] == 0:
        evaluate(args, accelerator, model, text, state)
    model.train()
    every = 0.5 if sys.stderr.isatty() else 30  # seconds: a log file gets a line now and then
    is_silent = not accelerator.is_main_process
    progress = tqdm(total=max_steps, initial=state["step"], unit="step", mininterval=every, disable=is_silent)
    for step in range(state["step"], max_steps):
        step_start = time.perf_counter()
        batches, num_targets = text.read_step(step, **cut)
        learning_rate = args.learning_rate_at(step, max_steps)
        taken = take_step(args, accelerator, model, optimizer, batches, num_targets, step, learning_rate, detector)

        # The step is done: count it, and tell.
        num_tokens = rows_per_step(args, accelerator) * args.block_size
        meter.step(num_tokens)
        state["step"] = step + 1
        state["train_tokens"] += num_tokens
        state["seconds"] += time.perf_counter() - step_start
        state["skipped_updates"] += not taken.is_update
        num_skipped_in_a_row = 0 if taken.is_update else num_skipped_in_a_row + 1
        interval_nats += taken.nats
        interval_targets += num_targets
        progress.update()
        is_last = state["step"] == max_steps
        is_stopping = stop_request.agreed()
        if state["step"] % args.logging_steps == 0 or is_last:
            record = {
                "step": state["step"],
                "loss": accelerator.reduce(interval_nats).item() / interval_targets,
                "learning_rate": learning_rate,
                "grad_norm": taken.grad_norm,
                "tokens_per_second": meter.read(),
                "train_tokens": state["train_tokens"],
            }
            log(args, accelerator, record, progress)
            interval_nats.zero_()
            interval_targets = 0
        stop_if_hopeless(args, num_skipped_in_a_row, state)
        with meter.paused():
            if state["step"] % args.eval_steps == 0 or is_last:
                evaluate(args, accelerator, model, text, state)
            if state["step"] % args.save_steps == 0 or is_last or is_stopping:
                save(args, accelerator, model, optimizer, text, state, detector)
        if is_stopping:
            break
    progress.close()
    return meter.overall()


def cut_of_step(args: PretrainArguments, accelerator: Accelerator) -> dict[str, Any]:
    """Which rows a step has, and how they are dealt to forward passes and processes."""
    batch = {"batch_size": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps}
    return {**batch, "seed": args.seed, "accelerator": accelerator}


def rows_per_step(args: PretrainArguments, accelerator: Accelerator) -> int:
    """The effective batch: rows per device x accumulation x processes, however it is cut."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


class Taken(NamedTuple):
    nats: torch.Tensor  # this process's part of the step's loss, summed over its targets
    grad_norm: float
    is_update: bool  # False: the gradient was not finite, or the step a spike


def take_step(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, torch.Tensor]],
    num_targets: int,
    step: int,
    learning_rate: float,
    detector: SpikeDetector | None = None,
) -> Taken:
    """Forward, backward, clip, update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # Dropout, like the order of rows, is a function of seed and step, so that a resumed run repeats it exactly.
    torch.manual_seed(np.random.SeedSequence((args.seed, step, accelerator.process_index)).generate_state(1)[0])

    # The loss of a step is the sum over its targets divided by their count, however its rows are cut into parts: each
    # part divides its own sum by the whole step's count. accelerate then divides by the accumulation steps and DDP by
    # the number of processes, so the count is that much smaller.
    num_parts = args.gradient_accumulation_steps * accelerator.num_processes
    nats = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            # transformers' own models compute a loss only if there are `labels`, and then prefer `shift_labels`.
            labels = batch["shift_labels"]
            loss = model(**batch, labels=labels, use_cache=False, num_items_in_batch=num_targets / num_parts).loss
            accelerator.backward(loss)
            nats += loss.detach() * (num_targets / num_parts)
            if accelerator.sync_gradients:
                grad_norm = clip_gradient(accelerator, model, args.max_grad_norm or math.inf)
                is_update = math.isfinite(grad_norm)
                if is_update and detector is not None:
                    step_loss = accelerator.reduce(nats).item() / num_targets
                    is_update = not detector.is_spike(step_loss, grad_norm)
                if not is_update:
                    optimizer.zero_grad()  # an update without gradients changes nothing
            optimizer.step()
            optimizer.zero_grad()
    return Taken(nats, grad_norm, is_update)


def save(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: TrainingText,
    state: dict,
    detector: SpikeDetector | None,
) -> None:
    start = time.perf_counter()
    state["text"] = text.state()
    if detector is not None:
        state["spike_history"] = detector.history
    save_checkpoint(
        Path(args.output_dir) / "checkpoints",
        model=model,
        optimizer=optimizer,
        state=state,
        accelerator=accelerator,
        keep=args.save_total_limit,
    )
    state["save_seconds"] += time.perf_counter() - start


def find_state(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: TrainingText,
    identity: dict,
) -> dict:
    """The state of the newest sound checkpoint, loaded into model, optimizer and stream; or that of the beginning."""
    directory = Path(args.output_dir) / "checkpoints"
    checkpoint = latest_checkpoint(directory, accelerator=accelerator)
    if checkpoint is not None:
        state = load_checkpoint(
            checkpoint, model=model, optimizer=optimizer, accelerator=accelerator, identity=identity
        )
        text.load_state(state.get("text"))
        accelerator.print(f"Going on from step {state['step']:,}, saved in {checkpoint}.")
        return state
    if list(directory.glob("step-*")):
        raise ValueError(
            f"No sound checkpoint is left in {directory}, only broken ones. Put a sound one there, or start anew with "
            "--overwrite_output_dir."
        )
    return {
        "step": 0,
        "train_tokens": 0,
        "seconds": 0.0,
        "save_seconds": 0.0,
        "skipped_updates": 0,
        "identity": identity,
    }


def rehearse_run(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: TrainingText,
    max_steps: int,
) -> None:
    """What the run would need and do: memory by part, time, the learning rate's course, and a row as text."""
    cut = cut_of_step(args, accelerator)
    first: list[dict[str, torch.Tensor]] = []

    def step(index: int) -> None:
        batches, num_targets = text.read_step(index, **cut)
        first.extend(batches[: not first])
        take_step(args, accelerator, model, optimizer, batches, num_targets, index, args.learning_rate_at(0, max_steps))

    model.train()
    need = rehearse(model, optimizer, step)
    num_tokens = rows_per_step(args, accelerator) * args.block_size
    hours = max_steps * need.seconds_per_step / 3600
    flops = flops_per_token(accelerator.unwrap_model(model), block_size=args.block_size)
    warm = min(args.warmup_steps, max_steps - 1)
    steps = sorted({0, warm, *(max_steps * quarter // 4 for quarter in (1, 2, 3)), max_steps - 1})
    accelerator.print(
        f"\n{need}\n"
        f"A checkpoint: {(need.parameters + need.optimizer_state) / 2**20:,.1f} MiB, times the processes if they share "
        "the model out.\n"
        f"Time: {need.seconds_per_step:.3f} s a step, {num_tokens / need.seconds_per_step:,.0f} tokens/s; "
        f"{max_steps:,} steps take {hours:.2f} hours without evaluations, and {max_steps * num_tokens * flops:.2e} "
        "floating-point operations.\nLearning rate: "
        + ", ".join(f"{args.learning_rate_at(step, max_steps):.2e} at step {step:,}" for step in steps)
        + f".\n\nThe first row of the first step, of {args.block_size} tokens:"
    )
    accelerator.print(describe_row(first[0], 0, text.tokenizer.decode))
    if checkpoints := sorted(path.name for path in (Path(args.output_dir) / "checkpoints").glob("step-*")):
        accelerator.print(f"\n{args.output_dir} holds a run, which would go on from {checkpoints[-1]}.")
    accelerator.print("\nThis was a dry run: nothing was written. Without --dry_run, it starts.")


def stop_if_hopeless(args: PretrainArguments, num_skipped_in_a_row: int, state: dict) -> None:
    if num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        or_spike = "" if args.skip_spikes is None else "or the step was a spike, "
        raise ValueError(
            f"The gradient was not finite {or_spike}{num_skipped_in_a_row} times in a row, up to step "
            f"{state['step']:,}; those updates were skipped. Start anew with a lower --learning_rate than "
            f"{args.learning_rate}."
        )


def delete_earlier_run(output_dir: Path, accelerator: Accelerator) -> None:
    """Delete what a run of ours writes, and nothing else that may lie in the folder."""
    if accelerator.is_main_process:
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
        for name in ("log.jsonl", "metrics.json", "curves.png", "model.safetensors", "config.json", "samples.txt"):
            (output_dir / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def build_config(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> GPTConfig:
    if args.model is not None:
        config = AutoConfig.from_pretrained(args.model)
        defaults = PretrainArguments()
        ignored = [name for name in SHAPE_ARGUMENTS if getattr(args, name) != getattr(defaults, name)]
        if ignored:
            print(f"--model {args.model} brings its own shape; not used: {', '.join(ignored)}.")
    else:
        overrides = parse_overrides(args.config_overrides or [], GPTConfig().to_dict())
        special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": args.num_hidden_layers,
            "hidden_size": args.hidden_size,
            "num_attention_heads": args.num_attention_heads,
            "num_key_value_heads": args.num_key_value_heads,
            "max_position_embeddings": args.block_size,
        }
        config = GPTConfig.from_preset(args.preset, **{**fields, **special_ids, **overrides})
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} ids, but the model's vocab_size is {config.vocab_size:,}: it has no "
            "embedding for the last ones. Use the model's own tokenizer, or leave vocab_size out."
        )
    if args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size={args.block_size:,} is longer than the model's {config.max_position_embeddings:,} positions. "
            f"Choose a block_size of at most {config.max_position_embeddings:,}."
        )
    return config


def load_text(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> TrainingText:
    return prepare_text(
        args.dataset,
        tokenizer,
        encode=document_encoder(tokenizer),
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        accelerator=accelerator,
        **{name: getattr(args, name) for name in TEXT_ARGUMENTS},
    )


def build_model(args: PretrainArguments, config: GPTConfig) -> PreTrainedModel:
    if args.model is not None:
        # Training needs float32 weights, whatever precision the checkpoint was exported in.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        model = GPTForCausalLM(config)
    if args.torch_compile:
        blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or [])]
        for module in blocks or [model]:  # one graph serves all blocks, so it is compiled once
            module.compile()
    return model


def describe(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: PreTrainedModel,
    text: TrainingText,
    max_steps: int,
) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_embedding = model.get_input_embeddings().weight.numel()
    tied = "tied to the head" if model.config.tie_word_embeddings else "beside a head of the same size"
    num_rows = rows_per_step(args, accelerator)
    passes = "a stream of rows"
    if isinstance(text.train, Rows):
        passes = f"{max_steps * num_rows / len(text.train):.2f} passes over {len(text.train):,} rows"
    sharding = f" ({kind})" if (kind := describe_sharding(accelerator)) else ""
    precision = "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    accelerator.print(
        f"Model: {num_parameters:,} parameters, of which {num_embedding:,} in the token embedding, {tied}.\n"
        f"Training: {max_steps:,} steps of {num_rows * args.block_size:,} tokens ({num_rows} rows of "
        f"{args.block_size}), {passes}, on {accelerator.num_processes} x {accelerator.device.type}{sharding} in "
        f"{precision}."
    )


def identify(args: PretrainArguments, accelerator: Accelerator, config: GPTConfig, text: TrainingText) -> dict:
    """What makes a run this run and no other; a checkpoint of another one is refused."""
    identity = {f"model.{name}": value for name, value in config.to_dict().items()}
    for volatile in ("transformers_version", "architectures", "auto_map", "dtype", "use_cache"):
        identity.pop(f"model.{volatile}", None)
    return {
        **json.loads(json.dumps(identity)),
        **text.identity,
        "rows_per_step": rows_per_step(args, accelerator),
        **{name: getattr(args, name) for name in FIXED_ARGUMENTS},
    }


def evaluate(
    args: PretrainArguments, accelerator: Accelerator, model: torch.nn.Module, text: TrainingText, state: dict
) -> dict:
    """Nats per token and bits per byte over every validation token, and a sample of what the model writes."""
    result = evaluate_rows(model, text.validation, batch_size=args.per_device_eval_batch_size, accelerator=accelerator)
    state["evaluation"] = dataclasses.asdict(result)  # part of the checkpoint, for the final numbers
    record = {"step": state["step"], "eval_loss": result.loss, "eval_bits_per_byte": result.bits_per_byte}
    if args.eval_train_rows:
        rows = np.arange(min(args.eval_train_rows, len(text.train)))
        record["eval_train_loss"], _ = score_rows(
            model, text.train, rows, batch_size=args.per_device_eval_batch_size, accelerator=accelerator
        )
    log(args, accelerator, record)
    # Generating with a sharded model takes all processes together, so such a run has no samples.
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if args.sample_tokens and state["step"] > 0 and accelerator.is_main_process and not is_sharded:
        text = sample(args, accelerator.unwrap_model(model), text.tokenizer)
        tqdm.write(f"    sample: {text!r}")
        with (Path(args.output_dir) / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {state['step']}\n{text}\n")


@torch.no_grad()
def sample(args: PretrainArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model writes after the prompt, one token drawn after the other."""
    was_training = model.training
    model.eval()
    prompt = tokenizer(args.sample_prompt, return_tensors="pt").input_ids
    if prompt.shape[1] == 0:
        prompt = torch.tensor([[tokenizer.eos_token_id]])
    room = model.config.max_position_embeddings - prompt.shape[1]
    tokens = model.generate(
        prompt.to(model.device), max_new_tokens=min(args.sample_tokens, room), do_sample=True, temperature=0.8, top_k=50
    )
    model.train(was_training)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def log(args: PretrainArguments, accelerator: Accelerator, record: dict, progress: tqdm | None = None) -> None:
    """One line of log.jsonl, the same to the trackers, and a word on the terminal."""
    try:
        accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])
    except Exception as error:  # each tracker fails in its own way, and none of them is worth a run
        warnings.warn(f"A tracker failed: {error!r}. The run goes on, and log.jsonl has everything.", stacklevel=1)
    if not accelerator.is_main_process:
        return
    append_to_log(Path(args.output_dir) / "log.jsonl", record)
    if "eval_loss" in record:
        tqdm.write(
            f"step {record['step']:,}: validation {record['eval_loss']:.4f} nats per token, "
            f"{record['eval_bits_per_byte']:.4f} bits per byte"
        )
    elif progress is not None:
        speed = record["tokens_per_second"]
        text = f"loss {record['loss']:.3f}" + (f", {speed:,.0f} tokens/s" if speed else "")
        progress.set_postfix_str(text, refresh=False)


def finish(
    args: PretrainArguments,
    accelerator: Accelerator,
    model: torch.nn.Module,
    text: TrainingText,
    state: dict,
    throughput: float | None,
    flops: int,
    num_parameters: int,
) -> None:
    """Save the model, `metrics.json` and the curves, and tell where they lie."""
    output_dir = Path(args.output_dir)
    result = Evaluation(**state["evaluation"])
    save_model(output_dir, model=model, accelerator=accelerator)
    if not accelerator.is_main_process:
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    peak = peak_flops(accelerator.device, dtype)
    metrics = {
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
        "tokens_per_second": throughput,
        "mfu": throughput and throughput * flops / (peak * accelerator.num_processes),
        "peak_flops_per_device": peak,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "num_parameters": num_parameters,
        "dataset": args.dataset,
        "corpus_sha256": text.fingerprint,
        "tokenizer_sha256": text.tokenizer_sha256,
        "seed": args.seed,
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    plot_curves(read_log(output_dir / "log.jsonl"), output_dir / "curves.png", title=str(output_dir))
    speed = f" at {throughput:,.0f} tokens/s, {metrics['mfu']:.0%} of what it can multiply" if throughput else ""
    print(
        f"""
{state["train_tokens"]:,} tokens in {state["seconds"] / 60:.1f} minutes{speed}.
Validation: {result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte.

{output_dir}/model.safetensors   the model, {num_parameters:,} parameters, with its tokenizer and code beside it
{output_dir}/curves.png          the curves; log.jsonl holds their numbers, metrics.json the final ones
{output_dir}/checkpoints         to go on from, with a larger --max_steps

Next, let it write:
    python recipes/generate.py --model {output_dir} --prompt "{args.sample_prompt or "import "}"
or open it in Python:
    import hfllm; from transformers import pipeline
    pipeline("text-generation", "{output_dir}")("{args.sample_prompt or "import "}")"""
    )


if __name__ == "__main__":
    run(main, PretrainArguments, description=__doc__)
