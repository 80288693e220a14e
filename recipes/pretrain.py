"""Chapters 2 to 5: pretrain a GPT from random weights on your own text.

On a laptop, offline, on the source of Python's standard library (three to five minutes on two cores):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        --config recipes/configs/pretrain_demo.yaml --tokenizer out/tokenizer --output_dir out/demo

On your own text, with a model and a run sized for half an hour on this machine (`--depth 4` is the same dial):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        --max_train_minutes 30 --dataset my.txt --tokenizer out/tokenizer --output_dir out/mine

On your own text, on one GPU:

    accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml recipes/pretrain.py \\
        --max_train_minutes 60 --dataset my.txt --tokenizer out/tokenizer --output_dir out/mine

On the GPUs of one machine, each with the whole model (`ddp.yaml`) or each with a part of it (`fsdp2.yaml`):

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 recipes/pretrain.py \\
        --max_train_minutes 60 --dataset my.txt --tokenizer out/tokenizer --output_dir out/mine

The text alone, encoded by all cores, as rows to train on later, here or elsewhere (`--dataset out/rows`):

    python recipes/pretrain.py --prepare_only --dataset my.txt --tokenizer out/tokenizer --output_dir out/rows

The same command again resumes an interrupted run. `--help` explains every option. accelerate decides how many devices
there are, how they share the work and in which precision they compute: by its file, or by options of the launcher, for
example `accelerate launch --mixed_precision bf16`.
"""

import dataclasses
import functools
import json
import math
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, parse_overrides, run, save_arguments
from hfllm.cli.opening import check_fit, open_causal_lm, open_config
from hfllm.cli.options import (
    Compared,
    arguments,
    changeable_of,
    check_numbers,
    differs,
    identity_of,
    inputs_of,
    option,
    values_of,
)
from hfllm.data.inspection import describe_row
from hfllm.data.packing import Rows
from hfllm.data.training_text import TrainingText, prepare_folder, prepare_text
from hfllm.evaluation.rows import evaluate_rows, join_evaluations, score_rows, time_evaluation
from hfllm.hub import TrainingPush, write_page_and_card
from hfllm.model import GPTConfig, GPTForCausalLM
from hfllm.report import plot_curves, save_environment
from hfllm.report.page import PAGE_FILE
from hfllm.runs.files import write_json
from hfllm.runs.finite import check_converged
from hfllm.runs.folder import RunFolder, claim_folder
from hfllm.runs.identity import hash_model, identify
from hfllm.runs.log import read_log
from hfllm.runs.processes import on_main_process
from hfllm.runs.progress import RunLog
from hfllm.runs.signals import EXIT_CODE, StopRequest
from hfllm.tokenization import document_encoder, load_tokenizer, tokenizer_fingerprint
from hfllm.training.checkpoint import (
    describe_start,
    find_checkpoint,
    find_state,
    load_checkpoint,
)
from hfllm.training.deadline import Deadline
from hfllm.training.devices import (
    check_attention,
    choose_attention,
    clip_gradient,
    dtype_of,
    leaving_at_once,
    start_accelerator,
)
from hfllm.training.optimization import build_adamw, build_muon, learning_rate_at, scale_learning_rates, skip_unless
from hfllm.training.rehearsal import Rehearsal, describe_rehearsal, rehearse
from hfllm.training.requirements import (
    USUAL_MFU,
    Pass,
    build_empty,
    count_on_cards,
    describe_rate,
    describe_requirements,
    missing_memory,
)
from hfllm.training.sampling import draw_sample
from hfllm.training.saving import CheckpointSaver
from hfllm.training.sizing import DIALS, Speed, check_dials, choose_sizes, slowest
from hfllm.training.spikes import SkippedUpdates, SpikeDetector, stop_if_hopeless
from hfllm.training.summary import describe_result, describe_run, final_metrics
from hfllm.training.throughput import ThroughputMeter, compile_model, flops_per_token, loss_options, peak_flops

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


# Defaults for options that neither the user nor a dial sets.
DEFAULT_SHAPE = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6}
DEFAULTS = {"num_train_epochs": 1.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
DEFAULTS |= {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "eval_steps": 100, "save_steps": 200}


# With --prepare_only, what to do instead of another option.
INSTEAD = {
    "streaming": "A stream is not prepared: leave one of them out.",
    "dry_run": "Leave one of them out.",
    "push_to_hub": "The command that pushes rows is printed at the end.",
    "overwrite_output_dir": "Delete the folder yourself, or choose another --output_dir.",
}


@arguments
class PretrainArguments(
    groups.TrainingDataset,
    groups.ValidationDataset,
    groups.ValidationSplit,
    groups.TextColumn,
    groups.DocumentSeparator,
    groups.Tokenizer,
    groups.BlockSize,
    groups.Stride,
    groups.Cache,
    groups.Model,
    groups.Shape,
    groups.Sizing,
    groups.Attention,
    groups.Compile,
    groups.GradientCheckpointing,
    groups.Training,
    groups.Muon,
    groups.AdamW,
    groups.Schedule,
    groups.EarlyStopping,
    groups.EvalSteps,
    groups.KeepBest,
    groups.EvalBatch,
    groups.Run,
    groups.SaveSteps,
    groups.Trackers,
    groups.Hub,
    groups.Config,
):
    # Text
    tokenizer = differs(None, default_is="the tokenizer of model, or out/tokenizer")
    block_size = differs(256, help="Tokens per row; also the longest context the model learns.")
    stride = differs(help="Cut windows this many tokens apart (chapter 2) instead of packing documents.")
    validation_fraction = differs(
        help="Share of the bytes held out for validation, by whole documents, or of each of a few long ones its end."
    )
    validation_dataset = differs(
        help="Hub id or local files to validate on; several, separated by commas, are measured one by one.",
        compared=Compared.BY_CONTENT,
    )
    streaming: bool = option(
        False,
        section="text",
        help="Read and encode while training, for text larger than the disk.",
        compared=Compared.BY_CONTENT,
    )

    prepare_only: bool = option(
        False,
        section="text",
        help="Make rows of the text in output_dir, to be used as dataset, and end.",
        compared=Compared.NOT,
    )
    prepare_part: str | None = option(
        None,
        section="text",
        help="With prepare_only, encode one part only, e.g. 0/8 to 7/8 on eight machines; run once more without it.",
        default_is="the whole text",
        compared=Compared.NOT,
    )

    # Model. Options that a dial (see Sizing) can set are None until then; `resolve` fills in the defaults.
    model = differs(None, help="Folder or Hub id of a model to train further.", default_is="random weights")
    preset: Literal["modern", "book"] = option(
        "modern", section="model", help="'modern' is a Qwen3, 'book' a GPT-2.", compared=Compared.BY_CONTENT
    )
    num_hidden_layers = differs(None, default_is=DEFAULT_SHAPE["num_hidden_layers"])
    hidden_size = differs(None, default_is=DEFAULT_SHAPE["hidden_size"])
    num_attention_heads = differs(None, default_is=DEFAULT_SHAPE["num_attention_heads"])
    config_overrides: list[str] | None = option(
        None,
        section="model",
        help="Fields of GPTConfig, e.g. attention_bias=false norm_eps=1e-5",
        compared=Compared.BY_CONTENT,
    )
    gradient_checkpointing = differs(compared=Compared.NOT)

    # Optimization. A resumed run may have another end, and other steps between evaluations and checkpoints.
    num_train_epochs = differs(None, default_is=DEFAULTS["num_train_epochs"], compared=Compared.NOT)
    max_steps = differs(compared=Compared.NOT)
    per_device_train_batch_size = differs(None, default_is=DEFAULTS["per_device_train_batch_size"])
    gradient_accumulation_steps = differs(None, default_is=DEFAULTS["gradient_accumulation_steps"])
    learning_rate = differs(
        None, help="Highest learning rate; with Muon, of the hidden matrices.", default_is="muon 0.02, adamw 0.001"
    )
    optimizer = differs(None, default_is="muon for random weights of the modern preset, adamw for all others")
    adam_learning_rate = differs(None, default_is="learning_rate")
    muon_momentum: float = option(0.85, section="optimization", help="Muon's decay of the mean.", at_least=0, below=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] | None = differs(
        None, default_is=DEFAULTS["lr_scheduler_type"]
    )
    decay_steps: int | None = option(
        None,
        section="optimization",
        help="Steps of warmup_stable_decay's final decay.",
        default_is="a fifth of max_steps",
        at_least=0,
    )
    min_lr_ratio: float | None = option(
        None,
        section="optimization",
        help="Lowest learning rate, as a share of the highest.",
        default_is=DEFAULTS["min_lr_ratio"],
    )
    weight_decay = differs(help="Decoupled weight decay of matrices and embeddings.")
    skip_spikes: float | None = option(
        None,
        section="optimization",
        help="Skip updates whose loss or gradient is this many standard deviations above the last 128.",
        above=0,
    )
    early_stopping_patience = differs(compared=Compared.NOT)
    seed = differs(help="Random seed of initial weights, order of rows and dropout.")

    # Evaluation
    eval_steps = differs(None, default_is=DEFAULTS["eval_steps"], compared=Compared.NOT)
    load_best_model_at_end = differs(
        help="Save a checkpoint at each evaluation with a lower loss than all before; the best one is the final model."
    )
    per_device_eval_batch_size = differs(compared=Compared.NOT)
    eval_on_start: bool = option(
        True, section="evaluation", help="Also evaluate before the first step.", compared=Compared.NOT
    )
    eval_train_rows: int = option(
        0,
        section="evaluation",
        help="Also evaluate on this many training rows, without dropout.",
        at_least=0,
        compared=Compared.NOT,
    )
    sample_prompt: str = option(
        "",
        section="evaluation",
        help="Beginning of the sample written after each evaluation.",
        default_is="the start of a document",
        compared=Compared.NOT,
    )
    sample_tokens: int = option(
        64, section="evaluation", help="Tokens of the sample; 0: no sample.", at_least=0, compared=Compared.NOT
    )

    # Output
    output_dir = differs(None, default_is="out/pretrain, or out/rows with prepare_only")
    save_steps = differs(None, default_is=DEFAULTS["save_steps"], compared=Compared.NOT)
    report_to = differs(help="Experiment trackers, by accelerate's names, e.g. tensorboard trackio wandb.")
    dry_run: bool = option(
        False,
        section="output",
        help="Check everything, report memory and time, measure a few steps if the model fits here; write nothing.",
        compared=Compared.NOT,
    )
    peak_tflops: float | None = option(
        None,
        section="output",
        help="For --dry_run, the peak of a device by its data sheet, in 1e12 operations per second.",
        default_is="this machine's, measured",
        above=0,
        compared=Compared.NOT,
    )
    mfu: float | None = option(
        None,
        section="output",
        help="For --dry_run, the share of the peak at which devices train.",
        default_is=USUAL_MFU,
        above=0,
        at_most=1,
        compared=Compared.NOT,
    )

    def resolve(self) -> None:
        """Fill in the defaults, except those that a dial decides later (see `size_model_and_run`)."""
        if self.output_dir is None:
            self.output_dir = "out/rows" if self.prepare_only else "out/pretrain"
        if self.optimizer is None:
            self.optimizer = "muon" if self.preset == "modern" and self.model is None else "adamw"
        if self.is_sized:
            return
        for name, value in ((DEFAULT_SHAPE if self.model is None else {}) | DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.learning_rate is None:
            self.learning_rate = {"muon": 0.02, "adamw": 1e-3}[self.optimizer]
        if self.optimizer == "adamw":
            if self.adam_learning_rate is not None:
                raise ValueError("--adam_learning_rate belongs to --optimizer muon; with adamw, give --learning_rate.")
            if self.muon_momentum != PretrainArguments.muon_momentum:
                raise ValueError("--muon_momentum belongs to --optimizer muon; adamw's are --adam_beta1, --adam_beta2.")
        elif self.adam_learning_rate is None:
            self.adam_learning_rate = self.learning_rate

    def check(self) -> None:
        """Validate options that need neither text nor tokenizer."""
        check_numbers(self)
        check_recipe(self)
        if self.prepare_only:
            for name in ("streaming", "dry_run", "push_to_hub", "overwrite_output_dir"):
                if getattr(self, name):
                    raise ValueError(f"--prepare_only writes rows and ends: it goes not with --{name}. {INSTEAD[name]}")
        elif self.prepare_part is not None:
            raise ValueError(f"--prepare_part {self.prepare_part} is for --prepare_only: give it as well.")
        _ = self.part  # raises if it is none
        if self.is_sized:
            check_dials(vars(self))
        elif self.streaming and self.max_steps is None:
            raise ValueError("The length of a stream is not known in advance: with --streaming, give --max_steps.")
        if self.streaming and self.eval_train_rows:
            raise ValueError(
                "--eval_train_rows reads rows again, and --streaming reads them once. Leave one of them out."
            )
        if not self.dry_run and (self.peak_tflops is not None or self.mfu is not None):
            raise ValueError("--peak_tflops and --mfu say how long a --dry_run expects a run to take: give it as well.")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo or self.hub_strategy == "end"):
            raise ValueError(
                "--hub_model_id, --hub_private_repo and --hub_strategy are for --push_to_hub: give it as well."
            )
        if self.max_steps is not None and not self.is_sized:
            self.height_at(0, self.max_steps)

    @property
    def part(self) -> tuple[int, int] | None:
        """The number and the count of --prepare_part."""
        if self.prepare_part is None:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", self.prepare_part)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(
                f"--prepare_part {self.prepare_part}: give the part and the number of parts, e.g. 0/8 for the first "
                "and 7/8 for the last of eight."
            )
        return int(match[1]), int(match[2])

    @property
    def is_sized(self) -> bool:
        """Whether a dial is given that sets the sizes."""
        return any(getattr(self, name) is not None for name in DIALS)

    def height_at(self, step: float, max_steps: int) -> float:
        """Learning-rate multiplier at a step."""
        return learning_rate_at(
            step,
            learning_rate=1.0,
            max_steps=max_steps,
            warmup_steps=self.warmup_steps,
            schedule=self.lr_scheduler_type,
            min_lr_ratio=self.min_lr_ratio,
            decay_steps=self.decay_steps,
        )


PRESENTED_FILES = ("curves.png", PAGE_FILE)


def main(args: PretrainArguments) -> None:
    args.resolve()
    args.check()
    disable_progress_bar()  # for loading and saving a model; training has its own

    # 1. Devices: `accelerate launch` decides how many processes there are, and how they share the work.
    accelerator = start_accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps or 1,
        per_device_train_batch_size=args.per_device_train_batch_size or 1,
        max_grad_norm=args.max_grad_norm,
        skips_updates=args.skip_spikes is not None,
        needs_whole_matrices=args.optimizer == "muon",
        gradient_checkpointing=args.gradient_checkpointing,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    check_attention(args.attn_implementation, accelerator.device)
    if args.prepare_only:
        with leaving_at_once(accelerator):
            prepare_only(args, accelerator)
        accelerator.end_training()
        return
    claim = claim_folder(
        args.output_dir,
        recipe="pretrain",
        overwrite=args.overwrite_output_dir,
        inputs=inputs_of(args),
        cache_dir=args.cache_dir,
        accelerator=accelerator,
        only_look=args.dry_run,
    )
    stopping = StopRequest(accelerator, at_once=args.dry_run)
    with leaving_at_once(accelerator), claim as folder, stopping as stop_request:
        is_finished = pretrain(args, accelerator, folder, stop_request)
    # DDP has to release the process group before it is destroyed. Otherwise gloo waits for Python's lock while Python
    # waits for gloo, and sometimes a process never ends.
    accelerator.free_memory()
    accelerator.end_training()
    if not is_finished:
        sys.exit(EXIT_CODE)


@dataclasses.dataclass
class TrainingState:
    """The state that changes from step to step, which a checkpoint keeps beside weights and optimizer."""

    identity: dict[str, Any]  # the identity of the run, compared on resume
    step: int  # optimizer steps taken
    train_tokens: int
    seconds: float  # in steps
    save_seconds: float
    skipped_updates: int
    evaluation: dict[str, Any] | None = None  # the last one
    evaluation_by_name: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # of each validation text, if several
    text: dict[str, Any] | None = None  # the position in a stream
    spike_history: list[list[float]] | None = None
    plans: list[list[int]] = dataclasses.field(default_factory=list)  # of the steps, see `Deadline`
    elapsed_seconds: float = 0.0  # of steps, evaluations and saves
    best_step: int | None = None  # of the evaluation with the lowest loss; the one before the first step does not count
    best_loss: float | None = None
    num_evaluations_since_best: int = 0

    def count_evaluation(self) -> bool:
        """Compare the last evaluation with the best one; True if it is better, and now the best."""
        assert self.evaluation is not None
        loss = self.evaluation["loss"]
        is_better = loss < (math.inf if self.best_loss is None else self.best_loss)
        if is_better:
            self.best_step, self.best_loss = self.step, loss
        self.num_evaluations_since_best = 0 if is_better else self.num_evaluations_since_best + 1
        return is_better

    def has_ended_early(self, patience: int | None) -> bool:
        return patience is not None and self.num_evaluations_since_best >= patience


class Setup(NamedTuple):
    """The objects that every step uses; model and optimizer are those that `accelerator.prepare` returned."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    text: TrainingText
    max_steps: int
    rows_per_step: int  # rows per device x accumulation x processes
    loss_options: dict[str, bool]  # arguments of the model's forward besides the batch
    sizes: dict[str, int]  # num_parameters and flops_per_token, counted before the model is sharded
    hub: TrainingPush | None = None  # with --push_to_hub
    saver: CheckpointSaver | None = None  # in a run that trains


def pretrain(args: PretrainArguments, accelerator: Accelerator, folder: RunFolder, stop_request: StopRequest) -> bool:
    """From text to a saved model; False if a signal stopped the run before its end."""
    # 2. The tokenizer, and checks that do not need the text
    tokenizer = open_tokenizer(args)
    if not args.is_sized:
        build_config(args, tokenizer)
    hub = None
    if args.push_to_hub and not args.dry_run:
        place = {"repo_id": args.hub_model_id, "private": args.hub_private_repo}
        hub = on_main_process(accelerator, lambda: TrainingPush(args.output_dir, **place))

    # 3. Text to rows
    text = load_text(args, tokenizer, accelerator)
    accelerator.print(text.summary)

    # 4. Sizes of the model, of a step and of the run. With a dial they follow from it and from the text.
    minutes = args.max_train_minutes if args.max_steps is None else None
    if args.is_sized:
        args = size_model_and_run(args, accelerator, text)
    config = build_config(args, tokenizer)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    num_rows = len(text.train) if isinstance(text.train, Rows) else None  # None: a stream
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * num_rows / rows_per_step)
    args.height_at(0, max_steps)  # raises if the schedule does not fit into this many steps
    report_unused_options(args, accelerator)

    batch = {"rows_per_step": rows_per_step, "block_size": args.block_size}
    described = {"accelerator": accelerator, "max_steps": max_steps, "num_rows": num_rows, **batch}
    if args.dry_run:
        empty = build_empty(config)
        set_attention(args, empty, accelerator)
        accelerator.print(describe_run(empty, **described))
        rehearse_run(args, empty, text, accelerator, max_steps=max_steps, rows_per_step=rows_per_step)
        text.close()
        return True

    # 5. The model, with random weights or from --model, and its optimizer
    torch.manual_seed(args.seed)
    model = build_model(args, config, accelerator)
    accelerator.print(describe_run(model, **described))
    setup = prepare(args, model, text, accelerator, max_steps=max_steps, hub=hub)

    # 6. The newest checkpoint of this run, or the beginning. Another run in the folder is refused; with
    # --overwrite_output_dir it is deleted only here, after everything that this run reads was checked.
    own = identity_of(args, by_content=True)
    if args.model is not None:
        own["base_sha256"] = hash_model(args.model, revision=getattr(config, "_commit_hash", None))
    identity = identify(config, **text.identity, rows_per_step=rows_per_step, **own)
    folder.check_same(identity)
    folder.make_way()
    restore = {"model": setup.model, "optimizer": setup.optimizer, "accelerator": accelerator, "identity": identity}
    state = TrainingState(**find_state(args.output_dir, **restore))
    if state.step > 0:
        text.load_state(state.text)
        report_another_end(args, folder, state.step, max_steps, accelerator)
    deadline = Deadline(state, planned_steps=max_steps, minutes=minutes, eval_steps=args.eval_steps)
    options = changeable_of(args) | {"max_steps": max_steps}
    for change in folder.begin(identity, options=options, files=("log.jsonl", "samples.txt", *PRESENTED_FILES)):
        accelerator.print(f"{change} from here on.")

    # 7. The loop, and then the model in the form that other tools open, with its numbers
    is_early = state.has_ended_early(args.early_stopping_patience)
    end = state.step if is_early else max(state.step, deadline.max_steps)
    # A deadline's last plan is in the last checkpoint alone; from an earlier one, only the record knows the end.
    is_end_known = minutes is None or state.step == folder.finished_step
    if not folder.is_finished(step=end if is_end_known else None):
        folder.reopen()
        accelerator.init_trackers("hfllm", config={name: str(value) for name, value in vars(args).items()})
        with folder.writing() as partial:
            if accelerator.is_main_process:
                save_arguments(args, partial / "arguments.yaml")
                tokenizer.save_pretrained(partial)
                save_environment(partial, num_processes=accelerator.num_processes)
        check_best(args, state, accelerator)
        setup = setup._replace(saver=build_saver(args, setup))
        tokens_per_second = train(args, setup, state, deadline, stop_request)
        setup.saver.wait()
        of_all = f"{state.step:,} of {deadline.max_steps:,}"
        if state.has_ended_early(args.early_stopping_patience) and state.step < deadline.max_steps:
            accelerator.print(
                f"Stopped early at step {of_all}: {state.num_evaluations_since_best:,} evaluations in a row without a "
                f"lower validation loss, and --early_stopping_patience is {args.early_stopping_patience:,}."
            )
        elif state.step < deadline.max_steps:
            accelerator.print(f"Stopped at step {of_all}; the same command resumes from here.")
            text.close()
            return False
        save_result(args, setup, folder, state, tokens_per_second)
    elif folder.is_done("page", file=PAGE_FILE) and (hub is None or folder.is_done("push")):
        accelerator.print(f"The run in {args.output_dir} ended at step {end:,}: nothing to do.")
        if is_early and end < deadline.max_steps:
            accelerator.print("It stopped early. To train further, give a larger --early_stopping_patience, or none.")

    # 8. Curves, page, card and push. If one of them fails, the same command repeats it.
    present(args, setup, folder)
    text.close()
    return True


def train(
    args: PretrainArguments, setup: Setup, state: TrainingState, deadline: Deadline, stop_request: StopRequest
) -> float | None:
    """Take the steps from `state.step` to the last one, and keep `state` up to date; returns tokens per second."""
    accelerator, max_steps = setup.accelerator, setup.max_steps
    tokens_per_step = setup.rows_per_step * args.block_size
    detector = SpikeDetector(args.skip_spikes, history=state.spike_history) if args.skip_spikes else None
    interval_nats = torch.zeros((), device=accelerator.device)  # since the last line of the log
    interval_targets = 0
    skipped = SkippedUpdates(accelerator.device)
    meter = ThroughputMeter(accelerator.device)
    with RunLog(args.output_dir, accelerator=accelerator, step=state.step, max_steps=max_steps) as log:
        deadline.start()
        if state.step == 0 and args.eval_on_start:
            evaluate(args, setup, state, log)
            deadline.count_evaluation()
        setup.model.train()
        while state.step < deadline.max_steps and not state.has_ended_early(args.early_stopping_patience):
            step, step_start = state.step, time.perf_counter()
            height = args.height_at(deadline.position(step), max_steps)
            batches, num_targets = read_step(args, setup, step)
            taken = take_step(args, setup, batches, num_targets, step, height, detector)

            # Counts
            meter.step(tokens_per_step)
            state.step = step + 1
            state.train_tokens += tokens_per_step
            state.seconds += time.perf_counter() - step_start
            skipped.count(taken.is_update)
            interval_nats += taken.nats
            interval_targets += num_targets
            log.advance()

            # Log, evaluation and checkpoint
            deadline.count_step()
            is_last = state.step == deadline.max_steps
            is_stopping = stop_request.agreed()
            is_log_step = state.step % args.logging_steps == 0 or is_last
            if is_log_step:
                record = {
                    "step": state.step,
                    "loss": accelerator.reduce(interval_nats).item() / interval_targets,
                    "learning_rate": args.learning_rate * height,
                    "grad_norm": taken.grad_norm.item(),
                    "tokens_per_second": meter.read(),
                    "train_tokens": state.train_tokens,
                }
                log.write(record)
                interval_nats.zero_()
                interval_targets = 0
            is_save_step = state.step % args.save_steps == 0 or is_last or is_stopping
            is_eval_step = state.step % args.eval_steps == 0 or is_last
            # In other steps Python must not wait for an accelerator.
            if is_log_step or is_save_step or is_eval_step or accelerator.device.type == "cpu":
                num_skipped, num_in_a_row = skipped.read()
                state.skipped_updates += num_skipped
                stop_if_hopeless(num_in_a_row, step=step + 1, learning_rate=args.learning_rate, detector=detector)
            with meter.paused():
                if is_eval_step:
                    evaluate(args, setup, state, log)
                    deadline.count_evaluation()
                    is_best = state.count_evaluation()
                    is_save_step |= is_best and args.load_best_model_at_end
                    is_save_step |= state.has_ended_early(args.early_stopping_patience)
                if (told := deadline.look()) is not None:
                    accelerator.print(f"\n{told}")
                if is_save_step:
                    save(args, setup, state, detector)
            if is_stopping:
                break
    return meter.overall()


def read_step(args: PretrainArguments, setup: Setup, step: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """This process's batches of a step, one per forward pass, and the number of targets of all processes."""
    return setup.text.read_step(
        step,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed,
        accelerator=setup.accelerator,
    )


class StepResult(NamedTuple):
    nats: torch.Tensor  # this process's part of the step's loss, summed over its targets
    grad_norm: torch.Tensor
    is_update: torch.Tensor  # a boolean; False: the gradient was not finite, or the step a spike


def take_step(
    args: PretrainArguments,
    setup: Setup,
    batches: list[dict[str, torch.Tensor]],
    num_targets: int,
    step: int,
    height: float,
    detector: SpikeDetector | None = None,
) -> StepResult:
    """Forward, backward, clip, update; the learning rate is `height` times the highest one."""
    accelerator, model, optimizer = setup.accelerator, setup.model, setup.optimizer
    scale_learning_rates(optimizer, height)
    # Dropout, like the order of rows, is a function of seed and step, so a resumed run repeats it exactly.
    torch.manual_seed(np.random.SeedSequence((args.seed, step, accelerator.process_index)).generate_state(1)[0])

    # The loss of a step is the sum over its targets divided by their number, however its rows are split: each part
    # divides its own sum by the number of the whole step. accelerate then divides by the accumulation steps and DDP by
    # the number of processes, so the number given here is smaller by these factors.
    num_parts = args.gradient_accumulation_steps * accelerator.num_processes
    nats = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            # transformers' own models compute a loss only if there are `labels`, and then prefer `shift_labels`.
            labels = batch["shift_labels"]
            count = {"num_items_in_batch": num_targets / num_parts}
            loss = model(**batch, labels=labels, use_cache=False, **count, **setup.loss_options).loss
            accelerator.backward(loss)
            nats += loss.detach() * (num_targets / num_parts)
            if accelerator.sync_gradients:
                grad_norm = clip_gradient(accelerator, model, args.max_grad_norm or math.inf)
                is_update = torch.isfinite(grad_norm)
                if detector is not None and is_update:
                    step_loss = accelerator.reduce(nats).item() / num_targets
                    is_update &= not detector.is_spike(step_loss, grad_norm.item())
                skip_unless(is_update, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return StepResult(nats, grad_norm, is_update)


def evaluate(args: PretrainArguments, setup: Setup, state: TrainingState, log: RunLog) -> None:
    """Log nats per token and bits per byte over every validation token, and a sample of what the model writes."""
    accelerator, text = setup.accelerator, setup.text
    scoring = {"batch_size": args.per_device_eval_batch_size, "accelerator": accelerator}
    named = {name: evaluate_rows(setup.model, rows, **scoring) for name, rows in text.validation_parts.items()}
    result = join_evaluations(named.values()) if named else evaluate_rows(setup.model, text.validation, **scoring)
    state.evaluation = dataclasses.asdict(result)
    state.evaluation_by_name = {f"eval_loss_{name}": part.loss for name, part in named.items()}
    state.evaluation_by_name |= {f"eval_bits_per_byte_{name}": part.bits_per_byte for name, part in named.items()}
    record = {"step": state.step, "eval_loss": result.loss, "eval_bits_per_byte": result.bits_per_byte}
    record |= state.evaluation_by_name
    if args.eval_train_rows:
        rows = np.arange(min(args.eval_train_rows, len(text.train)))
        record["eval_train_loss"], _ = score_rows(setup.model, text.train, rows, **scoring)
    log.write(record)
    # A sharded model can generate only on all processes together, so such a run has no samples.
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if args.sample_tokens and state.step > 0 and accelerator.is_main_process and not is_sharded:
        model = accelerator.unwrap_model(setup.model)
        sample = draw_sample(model, text.tokenizer, args.sample_prompt, num_tokens=args.sample_tokens)
        log.write_sample(state.step, sample)


def save(args: PretrainArguments, setup: Setup, state: TrainingState, detector: SpikeDetector | None) -> None:
    """Save a checkpoint, from which the run resumes exactly."""
    start = time.perf_counter()
    state.text = setup.text.state()
    state.spike_history = detector.history if detector is not None else None
    is_pushed = args.hub_strategy == "every_save" and state.step < setup.max_steps  # `present` pushes the end
    setup.saver.save(
        dataclasses.asdict(state),
        best_step=state.best_step if args.load_best_model_at_end else None,
        when_written=functools.partial(push_checkpoint, setup, state.step) if setup.hub and is_pushed else None,
    )
    state.save_seconds += time.perf_counter() - start


def build_saver(args: PretrainArguments, setup: Setup) -> CheckpointSaver:
    """What writes the checkpoints of this run: of a sharded model, in the background."""
    own = {"model": setup.model, "optimizer": setup.optimizer, "accelerator": setup.accelerator}
    directory = Path(args.output_dir) / "checkpoints"
    return CheckpointSaver(directory, **own, tokenizer=setup.text.tokenizer, keep=args.save_total_limit)


def push_checkpoint(setup: Setup, step: int, checkpoint: Path) -> None:
    setup.hub.push_checkpoint(checkpoint, setup.accelerator.unwrap_model(setup.model), step=step)


def save_result(
    args: PretrainArguments, setup: Setup, folder: RunFolder, state: TrainingState, tokens_per_second: float | None
) -> None:
    """Save the model and `metrics.json`, both or neither, and note that the run is finished."""
    accelerator, text = setup.accelerator, setup.text
    saved = load_best(args, setup, state) if args.load_best_model_at_end else state
    check_converged(saved.evaluation["loss"], num_choices=len(text.tokenizer))
    with folder.writing() as partial:
        setup.saver.save_model(partial, step=saved.step)
        if accelerator.is_main_process:
            speed = {"tokens_per_second": tokens_per_second, **setup.sizes}
            counts = dataclasses.asdict(state) | {"evaluation": saved.evaluation}
            metrics = final_metrics(counts, accelerator=accelerator, **speed)
            metrics |= saved.evaluation_by_name
            if args.load_best_model_at_end:
                metrics["best_step"] = saved.step
            metrics |= {"dataset": args.dataset, "corpus_sha256": text.fingerprint}
            metrics |= {"tokenizer_sha256": text.tokenizer_sha256, "seed": args.seed}
            write_json(partial / "metrics.json", metrics)
    folder.finish(step=state.step)


def check_best(args: PretrainArguments, state: TrainingState, accelerator: Accelerator) -> None:
    """Forget the best evaluation of a resumed run if its checkpoint is missing."""
    if not args.load_best_model_at_end or state.best_step in (None, state.step):
        return
    directory = Path(args.output_dir) / "checkpoints"
    if find_checkpoint(directory, step=state.best_step, accelerator=accelerator) is None:
        accelerator.print(
            f"The checkpoint of step {state.best_step:,}, the best one so far, is missing or broken: from here on, the "
            "best model is chosen among new evaluations."
        )
        state.best_step = state.best_loss = None


def load_best(args: PretrainArguments, setup: Setup, state: TrainingState) -> TrainingState:
    """Load the weights of the best evaluation into the model; returns the state of the run at that step."""
    if state.best_step in (None, state.step):
        return state
    directory, accelerator = Path(args.output_dir) / "checkpoints", setup.accelerator
    checkpoint = find_checkpoint(directory, step=state.best_step, accelerator=accelerator)
    if checkpoint is None:
        raise ValueError(
            f"The checkpoint of step {state.best_step:,}, whose model is the best of the run, is missing or broken. "
            f"Start the same command again to save the model of step {state.step:,} instead."
        )
    own = {"model": setup.model, "optimizer": setup.optimizer, "accelerator": accelerator}
    return TrainingState(**load_checkpoint(checkpoint, **own))


def present(args: PretrainArguments, setup: Setup, folder: RunFolder) -> None:
    """Draw the curves, write page and card, print where everything is, and push; steps that are done are skipped."""

    def draw() -> None:
        output_dir = Path(args.output_dir)
        plot_curves(read_log(output_dir / "log.jsonl"), output_dir / "curves.png", title=output_dir.resolve().name)
        write_page_and_card(output_dir)
        prompt = args.sample_prompt or ("import " if args.dataset == "stdlib" else "The ")
        metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
        print(describe_result(output_dir, metrics, prompt=prompt))

    if not folder.is_done("page", file=PAGE_FILE):
        on_main_process(setup.accelerator, draw)
        folder.note_done(page=True)
    hub = setup.hub
    if hub is not None and not folder.is_done("push"):
        address = on_main_process(setup.accelerator, hub.push_result)
        if address is not None:
            folder.note_done(push=address)
            setup.accelerator.print(f"\nOn the Hub: {address}")


def open_tokenizer(args: PretrainArguments) -> PreTrainedTokenizerBase:
    return load_tokenizer(args.tokenizer or args.model or "out/tokenizer")


TEXT = (
    *(groups.TrainingDataset, groups.ValidationDataset, groups.ValidationSplit, groups.TextColumn),
    *(groups.DocumentSeparator, groups.BlockSize, groups.Stride, groups.Cache),
)


def text_options(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of `prepare_text` and `prepare_folder`."""
    reading = values_of(args, *TEXT)
    reading["exclude"] = [path for path in (args.output_dir, args.cache_dir) if path is not None]
    encoding = {"encode": document_encoder(tokenizer), "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    return {"tokenizer": tokenizer, **encoding, **reading}


def load_text(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator) -> TrainingText:
    options = text_options(args, tokenizer)
    return prepare_text(**options, accelerator=accelerator, streaming=args.streaming, seed=args.seed)


def prepare_only(args: PretrainArguments, accelerator: Accelerator) -> None:
    """Make rows of the text in --output_dir, or encode a part of them, and print what to type next."""
    options = text_options(args, open_tokenizer(args))
    words = ["python", "recipes/pretrain.py", "--prepare_only"]
    for name in (*values_of(args, *TEXT, groups.Tokenizer), "model", "output_dir"):
        value = getattr(args, name)
        if value != getattr(PretrainArguments, name):
            words += [f"--{name}", str(value)]
    command = shlex.join([*words, "--prepare_part"])
    is_complete = prepare_folder(
        args.output_dir, **options, accelerator=accelerator, part=args.part, part_command=command
    )
    if is_complete:
        folder = shlex.quote(args.output_dir)
        training = ["--dataset", args.output_dir, "--tokenizer", f"{args.output_dir}/tokenizer"]
        training += ["--block_size", str(args.block_size)]
        for name in ("stride", "validation_fraction"):
            if getattr(args, name) != getattr(PretrainArguments, name) and args.validation_dataset is None:
                training += [f"--{name}", str(getattr(args, name))]
        accelerator.print(
            f"The rows are in {args.output_dir}; datasets.load_from_disk opens them. To train on them, here or where "
            f"the folder is copied to:\n    accelerate launch recipes/pretrain.py {shlex.join(training)}\n"
            f"To push them to the Hub, for --dataset me/rows:\n"
            f"    hf upload me/rows {folder} --repo-type dataset"
        )


def build_config(args: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of --model, or of the preset with the sizes that are given; the tokenizer must fit it."""
    if args.model is not None:
        config = open_config(args.model)
    else:
        overrides = parse_overrides(args.config_overrides or [], GPTConfig().to_dict())
        special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = values_of(args, groups.Shape)
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": args.block_size}
        config = GPTConfig.from_preset(args.preset, **{**shape, **sizes, **special_ids, **overrides})
    check_fit(config, num_ids=len(tokenizer), block_size=args.block_size)
    return config


def build_model(args: PretrainArguments, config: PreTrainedConfig, accelerator: Accelerator) -> PreTrainedModel:
    if args.model is not None:
        # Training needs float32 weights, in whatever precision the checkpoint was saved.
        model = open_causal_lm(args.model, dtype=torch.float32)
    else:
        model = GPTForCausalLM(config)
    set_attention(args, model, accelerator)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if args.torch_compile:
        compile_model(model)
    return model


def set_attention(args: PretrainArguments, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Set the attention that was asked for, or the fastest one for packed documents on this device."""
    model.set_attn_implementation(args.attn_implementation or choose_attention(model, accelerator.device))


def build_optimizer(args: PretrainArguments, model: PreTrainedModel, accelerator: Accelerator) -> torch.optim.Optimizer:
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "epsilon": args.adam_epsilon}
    rates = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return build_adamw(model, **rates, **adam)
    rates["adam_learning_rate"] = args.adam_learning_rate
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    # Under DDP every process has all matrices and gradients: they share the work. `WORLD` is None for a single process.
    shared = {"process_group": torch.distributed.group.WORLD}
    return build_muon(model, **rates, **adam, **shared, momentum=args.muon_momentum, dtype=dtype)


def prepare(
    args: PretrainArguments,
    model: PreTrainedModel,
    text: TrainingText,
    accelerator: Accelerator,
    *,
    max_steps: int,
    hub: TrainingPush | None = None,
) -> Setup:
    """The model and its optimizer, prepared for the devices."""
    num_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    flops = flops_per_token(model, block_size=args.block_size)
    sizes = {"num_parameters": model.num_parameters(), "flops_per_token": flops}
    options = loss_options(model)
    model, optimizer = accelerator.prepare(model, build_optimizer(args, model, accelerator))
    return Setup(accelerator, model, optimizer, text, max_steps, num_rows, options, sizes, hub)


def report_another_end(
    args: PretrainArguments, folder: RunFolder, step: int, max_steps: int, accelerator: Accelerator
) -> None:
    """Print how another number of steps changes the learning rate of a resumed run."""
    before = (folder.record.get("options") or {}).get("max_steps")
    if not isinstance(before, int) or step >= max_steps:
        return
    old, new = (args.learning_rate * args.height_at(min(step, end), end) for end in (before, max_steps))
    if not math.isclose(old, new, rel_tol=1e-3):
        accelerator.print(
            f"The learning rate changes with --max_steps: at step {step:,} it is {new:.3g} instead of {old:.3g}, as "
            f"{args.lr_scheduler_type} falls until the last step, which was {before:,} and is {max_steps:,}. To be "
            "able to extend a run, train it with --lr_scheduler_type warmup_stable_decay."
        )


def report_unused_options(args: PretrainArguments, accelerator: Accelerator) -> None:
    if args.max_steps and args.num_train_epochs not in (None, DEFAULTS["num_train_epochs"]):
        accelerator.print(f"--max_steps {args.max_steps:,} ends the run; not used: --num_train_epochs.")
    shape = ("preset", *values_of(args, groups.Shape), "config_overrides")
    unused = [name for name in shape if getattr(args, name) != getattr(PretrainArguments, name)]
    if args.model is not None and unused:
        accelerator.print(f"--model {args.model} has its own shape; not used: {', '.join(unused)}.")


def size_model_and_run(args: PretrainArguments, accelerator: Accelerator, text: TrainingText) -> PretrainArguments:
    """The arguments with every option of SIZED: from --depth or a budget, or from the run being resumed."""
    sizes, description = choose_sizes(
        vars(args),
        vocab_size=len(text.tokenizer),
        text_tokens=len(text.train) * args.block_size if isinstance(text.train, Rows) else None,
        num_processes=accelerator.num_processes,
        measure=lambda sizes: measure_speed(dataclasses.replace(args, **sizes), accelerator, text),
    )
    accelerator.print(description)
    args = dataclasses.replace(args, **sizes)
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    return args


def measure_speed(args: PretrainArguments, accelerator: Accelerator, text: TrainingText) -> Speed:
    """The seconds of a step and of an evaluation, measured with a temporary model of these sizes."""
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    model = build_model(args, build_config(args, text.tokenizer), accelerator)
    max_steps = args.warmup_steps + (args.decay_steps or 0) + 10  # more than are taken; the rate does not matter here
    setup = prepare(args, model, text, accelerator, max_steps=max_steps)
    seconds_per_step = try_steps(args, setup, num_steps=5).seconds_per_step
    scoring = {"batch_size": args.per_device_eval_batch_size, "accelerator": accelerator}
    seconds_per_evaluation = time_evaluation(setup.model, text.validation, **scoring)
    accelerator.free_memory(setup.model, setup.optimizer)
    return slowest(Speed(seconds_per_step, seconds_per_evaluation))


def try_steps(args: PretrainArguments, setup: Setup, **options: int) -> Rehearsal:
    """The memory and the time of the run's first steps; they change the weights."""
    setup.model.train()
    return rehearse(
        setup.model,
        setup.optimizer,
        lambda step: take_step(args, setup, *read_step(args, setup, step), step, args.height_at(step, setup.max_steps)),
        **options,
    )


def rehearse_run(
    args: PretrainArguments,
    empty: PreTrainedModel,
    text: TrainingText,
    accelerator: Accelerator,
    *,
    max_steps: int,
    rows_per_step: int,
) -> None:
    """Print the needs of the run, computed and, if the model fits here, measured; and a row as text.

    `empty` is the model without its weights.
    """
    [first], _ = text.read_step(
        0,
        batch_size=args.per_device_train_batch_size,
        accumulation=1,
        seed=args.seed,
        accelerator=accelerator,
    )
    dtype = dtype_of(accelerator)
    one_pass = Pass(args.per_device_train_batch_size, args.block_size, dtype, args.gradient_checkpointing)
    activations = count_on_cards(empty.config, one_pass)
    accelerator.print(f"\n{describe_requirements(empty, activations, one_pass)}\n", flush=True)
    missing = missing_memory(empty, activations, one_pass, optimizer=args.optimizer, accelerator=accelerator)
    if missing or args.peak_tflops or args.mfu:
        is_given = args.peak_tflops is not None
        peak = args.peak_tflops * 1e12 if is_given else peak_flops(accelerator.device, dtype)
        mfu = args.mfu or USUAL_MFU
        source = f"{mfu:.0%} (--mfu) of {peak / 1e12:,.4g} TFLOP/s "
        source += "(--peak_tflops)" if is_given else "(measured here; for another device give --peak_tflops)"
        num_tokens = max_steps * rows_per_step * args.block_size
        flops = flops_per_token(empty, block_size=args.block_size)
        accelerator.print(describe_rate(num_tokens, flops, flops_per_second=mfu * peak, source=source))
    if missing:
        needed, free = (f"{num_bytes / 2**30:,.1f} GiB" for num_bytes in missing)
        accelerator.print(f"No step is tried here: that takes {needed}, and {free} are free.")
    else:
        accelerator.print("Trying four steps here; Ctrl-C ends it.", flush=True)
        torch.manual_seed(args.seed)
        setup = prepare(args, build_model(args, empty.config, accelerator), text, accelerator, max_steps=max_steps)
        needed = describe_rehearsal(
            try_steps(args, setup),
            max_steps=max_steps,
            tokens_per_step=rows_per_step * args.block_size,
            flops_per_token=setup.sizes["flops_per_token"],
            learning_rate_at=lambda step: args.learning_rate * args.height_at(step, max_steps),
            warmup_steps=args.warmup_steps,
        )
        accelerator.print(f"\n{needed}")
    accelerator.print(f"\nThe first row of the first step, of {args.block_size} tokens:")
    accelerator.print(describe_row(first, 0, text.tokenizer.decode))
    accelerator.print(f"{describe_start(args.output_dir)}\nThis was a dry run: nothing was written.")


if __name__ == "__main__":
    run(main, PretrainArguments, description=__doc__)
