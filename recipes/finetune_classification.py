"""Chapter 6 and appendix E: fine-tune a pretrained model to put texts into classes.

On a laptop, offline: which package of Python's standard library does a docstring come from?

    python recipes/finetune_classification.py --config recipes/configs/classification_stdlib.yaml \\
        --model out/demo --output_dir out/classifier

The book's spam messages, or a table of your own (.csv, .tsv, .jsonl, .json, .parquet, or an id on the Hub):

    python recipes/finetune_classification.py --config recipes/configs/classification_sms.yaml \\
        --model openai-community/gpt2 --output_dir out/spam
    python recipes/finetune_classification.py --model out/demo --dataset mine.csv --text_column message \\
        --label_column topic --output_dir out/topics

On the GPUs of one machine:

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 recipes/finetune_classification.py \\
        --config recipes/configs/classification_sms.yaml --model openai-community/gpt2 --output_dir out/spam

The same command again resumes an interrupted run. `--help` explains every option.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # what imports leave is no garbage, and looking through it takes a fifth of the start: until `run`

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from hfllm.adapters import add_lora, count_parameters, describe_trained, merge_adapter, save_adapter
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run, save_arguments
from hfllm.cli.opening import check_fit, open_config
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data.labelled_texts import (
    LabelledTexts,
    balance_labels,
    check_labels_known,
    describe_labelled_texts,
    label_names,
    load_labelled_texts,
    split_by_text,
)
from hfllm.evaluation.classification import describe_scores, score_beside_baselines, score_predictions
from hfllm.fine_tuning.classification import ClassifierTrainer, freeze_all_but
from hfllm.fine_tuning.run import LogFile, newest_checkpoint, prepare_folder, trackers
from hfllm.hub import write_page_and_card
from hfllm.model import GPTConfig
from hfllm.report import save_environment
from hfllm.report.confusion import plot_confusion
from hfllm.runs.lock import run_lock
from hfllm.tokenization import load_classifier_tokenizer
from hfllm.training.devices import check_precision, keep_freed_memory


# By method, for models of fewer than 512 channels and for larger ones. The first are for the demo's model: `lora` and
# `full` as chosen on validation texts (see the configs), `last_block` and `head` not tried apart. The second are the
# book's for GPT-2's 124 million parameters, as far as it has them. LoRA starts from a product of zero and bears more.
# The head is new, and starts from nothing.
SMALL = 512
LEARNING_RATES = {"lora": (2e-3, 8e-4), "full": (2e-4, 5e-5), "last_block": (1e-3, 2e-4)}
HEAD_LEARNING_RATES = {"lora": (1e-2, 8e-4), "full": (5e-3, 5e-5), "last_block": (1e-2, 2e-4), "head": (1e-2, 5e-3)}
BY_METHOD, HEAD_BY_METHOD = (
    ", ".join(f"{method} {small:g} / {large:g}" for method, (small, large) in rates.items())
    for rates in (LEARNING_RATES, HEAD_LEARNING_RATES)
)
PARTS = ("train", "eval", "test")  # as the numbers of metrics.json call them


EVALUATION = (
    "epoch {epoch:.1f}, validation loss {eval_loss:.4f}, accuracy {eval_accuracy:.2%}, macro-F1 {eval_f1_macro:.3f}"
)


@arguments
class ClassificationArguments(
    groups.TrainingDataset,
    groups.ValidationSplit,
    groups.TestFraction,
    groups.TextColumn,
    groups.LabelColumn,
    groups.BlockSize,
    groups.Model,
    groups.Method,
    groups.LoRA,
    groups.GradientCheckpointing,
    groups.Precision,
    groups.Training,
    groups.Schedule,
    groups.EvalBatch,
    groups.Run,
    groups.Trackers,
    groups.Config,
):
    # Text
    dataset = differs(help="File of labelled texts, Hub id, or 'stdlib': docstrings and their packages.")
    validation_fraction = differs(
        0.1, help="Share of the texts held out to choose the epoch by.", at_least=None, above=0
    )
    validation_split = differs(help="Split of the Hub dataset to choose the epoch by.")
    validation_dataset: str | None = option(
        None,
        section="text",
        help="File of labelled texts to choose the epoch by.",
        default_is="see validation_fraction",
        location=Location.READ_OR_NAMED,
    )
    test_fraction = differs(0.2, help="Share of the texts held out for the test.")
    test_split: str | None = option(
        None, section="text", help="Split of the Hub dataset to test on.", default_is="see test_fraction"
    )
    test_dataset: str | None = option(
        None,
        section="text",
        help="File of labelled texts to test on.",
        default_is="see test_fraction",
        location=Location.READ_OR_NAMED,
    )
    label_column = differs(help="Column or JSON key of the label, a word or a whole number.")
    balance: bool = option(
        False, section="text", help="Use as many texts of each label as the rarest label has, as the book does."
    )
    split_seed: int = option(
        0, section="text", help="Random seed of the split and of balance.", at_least=0, at_most=2**32 - 1
    )
    block_size = differs(help="Tokens of a text that are read; a longer one loses its end.", at_least=2)

    # Model
    model = differs(help="Folder or Hub id of the pretrained model, with its tokenizer.")
    pooling: Literal["last", "mean", "mean_first_last"] | None = option(
        None,
        section="model",
        help="Input of the classification head: the last token's state, the mean of all states, or that mean beside "
        "the mean of the embeddings. Other architectures than ours have the last token's only.",
        default_is="mean_first_last for our models, last for others",
    )
    lora_target_modules: list[str] | None = option(
        None, section="LoRA", help="Layers with LoRA.", default_is="all linear layers of the blocks"
    )

    # Optimization
    num_train_epochs = differs(5.0, help="Passes over the training texts, unless max_steps is given.")
    per_device_train_batch_size = differs(help="Texts per device and forward pass.")
    per_device_eval_batch_size = differs(32, help="Texts per device in evaluation.")
    learning_rate = differs(
        None,
        help="Highest learning rate of the pretrained weights, or of LoRA's.",
        default_is=f"by method, for fewer than {SMALL} channels / for more: {BY_METHOD}",
    )
    head_learning_rate: float | None = option(
        None,
        section="optimization",
        help="Highest learning rate of the new head and, with method full, of the token embeddings.",
        default_is=HEAD_BY_METHOD,
        at_least=0,
    )
    label_smoothing_factor: float = option(
        0.0, section="optimization", help="Share of the target spread over all labels.", at_least=0, below=1
    )
    train_sampling_strategy: Literal["group_by_length", "random"] = option(
        "group_by_length", section="optimization", help="Batches of texts of similar lengths, or of random ones."
    )
    seed = differs(help="Random seed of head, LoRA, order of texts and dropout.")

    # Output
    output_dir = differs("out/classifier")
    save_total_limit = differs(help="Number of checkpoints to keep; one is saved after each epoch.")
    report_to = differs(help="Experiment trackers, by transformers' names, e.g. tensorboard trackio wandb.")

    def check(self) -> None:
        check_numbers(self)
        check_recipe(self)
        check_precision()
        for name in ("validation", "test"):
            if getattr(self, f"{name}_split") is not None and getattr(self, f"{name}_dataset") is not None:
                raise ValueError(f"--{name}_split and --{name}_dataset both say what to use for {name}. Leave one out.")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("--validation_fraction and --test_fraction leave nothing to train on.")
        defaults = ClassificationArguments()
        lora = [name for name in vars(self) if name.startswith("lora_")]
        unused = [f"--{name}" for name in lora if getattr(self, name) != getattr(defaults, name)]
        if self.method != "lora" and unused:
            raise ValueError(f"{', '.join(unused)}: only --method lora has LoRA; this one is {self.method!r}.")
        if self.method == "head" and self.learning_rate is not None:
            raise ValueError("--learning_rate: --method head trains the new head alone. Give --head_learning_rate.")
        if (os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED") or "") == "true":
            raise ValueError(
                "The accelerate file shards the model (FSDP, DeepSpeed), and this recipe tests and saves whole models. "
                "Use accelerate_configs/ddp.yaml or multi_cpu.yaml; LoRA needs little memory."
            )


def main(args: ClassificationArguments) -> None:
    args.check()
    args.pooling, args.learning_rate, args.head_learning_rate = choose_for_model(args)
    output_dir = Path(args.output_dir)
    is_main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and writing; training has its own
    keep_freed_memory()
    with run_lock(output_dir) if is_main else contextlib.nullcontext():
        # Whether the run is finished is the main process's answer, for all of them.
        [is_finished] = broadcast_object_list([is_main and prepare_folder(args)])
        if is_finished:
            return
        # 1. The texts: read, checked and split before anything is trained.
        train, validation, test = load_parts(args)
        names = label_names(train.labels)
        check_labels_known(names, validation=validation, test=test)

        # 2. The model, with a new head of one output a label. It stands on the last token of a text, which alone has
        #    seen all of it, or on a mean of all tokens; which of them are text, the attention mask says.
        set_seed(args.seed)
        tokenizer = load_classifier_tokenizer(args.model)
        model = open_model(args, tokenizer, names)
        block_size = args.block_size or model.config.max_position_embeddings
        tokenizer.model_max_length = block_size
        parts = [encode(part, tokenizer, names, block_size) for part in (train, validation, test)]
        if is_main:
            print(describe_labelled_texts(train, validation, test, names))
            print(describe_lengths(parts, block_size))

        # 3. What is trained of it.
        if args.method == "lora":
            model = add_lora(
                model,
                r=args.lora_r,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                target_modules=args.lora_target_modules,
                gradient_checkpointing=args.gradient_checkpointing,
            )
        else:
            freeze_all_but(model, args.method)
        num_trained, _ = count_parameters(model)
        if is_main:
            print(describe_trained(model))

        # 4. Training. Texts of about equal lengths share a batch, padded to the longest of them.
        trainer = ClassifierTrainer(
            model=model,
            args=training_arguments(args),
            train_dataset=parts[0],
            eval_dataset=parts[1],
            data_collator=collate_with(tokenizer),
            compute_metrics=lambda prediction: score_for_trainer(prediction, names),
            head_learning_rate=args.head_learning_rate,
            callbacks=[LogFile(output_dir / "log.jsonl", EVALUATION.format_map)],
        )
        trainer.remove_callback(PrinterCallback)
        if is_main:
            save_arguments(args, output_dir / "arguments.yaml")
            save_environment(output_dir, num_processes=PartialState().num_processes)
        [last] = broadcast_object_list([newest_checkpoint(output_dir) if is_main else None])
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=last)
        seconds = time.perf_counter() - start

        # 5. What was trained is merged into the model, and that model is saved, and tested as it was saved.
        model = trainer.accelerator.unwrap_model(trainer.model)
        if args.method == "lora":
            if is_main:
                save_adapter(model, output_dir / "adapter")
            model = merge_adapter(model)
        if is_main:
            model.save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
        collate = collate_with(tokenizer)
        logits = {name: predict(args, model, part, collate) for name, part in zip(PARTS[1:], parts[1:])}
        num_tokens, num_places = trainer.count_tokens()
        if is_main:
            evaluating = sum(entry.get("eval_runtime", 0) for entry in trainer.state.log_history)
            metrics = {
                "method": args.method,
                "num_trained_parameters": num_trained,
                "num_parameters": count_parameters(model)[1],
                "train_texts": len(train),
                "train_tokens": num_tokens,  # since the last start, as are the next three
                "padding_waste": 1 - num_tokens / num_places if num_tokens else None,
                "train_seconds": round(seconds, 1),
                "tokens_per_second": num_tokens / (seconds - evaluating) if num_tokens else None,
                "train_steps": trainer.state.global_step,
                "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
                "seed": args.seed,
            }
            finish(args, names, (train, validation, test), logits, metrics)


def choose_for_model(args: ClassificationArguments) -> tuple[str, float, float]:
    """The pooling and the two learning rates: what was asked for, or the defaults for this model.

    A mean of a text's tokens is for models of ours; the Hub's other classes have the last token only.
    """
    config = open_config(args.model)
    is_ours = isinstance(config, GPTConfig)
    if args.pooling not in (None, "last") and not is_ours:
        raise ValueError(
            f"--pooling {args.pooling}: {args.model} is a {config.model_type}, whose classifier in transformers stands "
            "on the last token. Leave --pooling out, or make a model of ours of it first: recipes/export.py --to hfllm."
        )
    size = int(config.hidden_size >= SMALL)
    head_learning_rate = args.head_learning_rate
    if head_learning_rate is None:
        head_learning_rate = HEAD_LEARNING_RATES[args.method][size]
    learning_rate = args.learning_rate
    if args.method == "head":
        learning_rate = head_learning_rate
    elif learning_rate is None:
        learning_rate = LEARNING_RATES[args.method][size]
    return args.pooling or ("mean_first_last" if is_ours else "last"), learning_rate, head_learning_rate


def load_parts(args: ClassificationArguments) -> tuple[LabelledTexts, LabelledTexts, LabelledTexts]:
    """The texts to train on, to validate on and to test on: given ones, or parts of the dataset."""
    options = {name: getattr(args, name) for name in ("text_column", "label_column", "on_bad_record")}
    data = load_labelled_texts(args.dataset, dataset_config=args.dataset_config, split=args.split, **options)
    label_names(data.labels)
    given: dict[str, LabelledTexts | None] = {}
    for name in ("validation", "test"):
        dataset, split = getattr(args, f"{name}_dataset"), getattr(args, f"{name}_split")
        if dataset is not None:
            given[name] = load_labelled_texts(dataset, **options)
        elif split is not None:
            given[name] = load_labelled_texts(args.dataset, dataset_config=args.dataset_config, split=split, **options)
        else:
            given[name] = None
    if args.balance:
        data = balance_labels(data, seed=args.split_seed)
    validation_fraction = 0.0 if given["validation"] else args.validation_fraction
    test_fraction = 0.0 if given["test"] else args.test_fraction
    fractions = (1 - validation_fraction - test_fraction, validation_fraction, test_fraction)
    train, validation, test = split_by_text(data, fractions=fractions, seed=args.split_seed)
    train = dataclasses.replace(train, num_empty=data.num_empty, num_bad=data.num_bad)
    parts = (train, given["validation"] or validation, given["test"] or test)
    for name, part in zip(("train on", "validate on", "test on"), parts):
        if not len(part):
            raise ValueError(
                f"{len(data):,} texts are too few: none is left to {name}. Give more, or larger fractions."
            )
    return parts


def open_model(args: ClassificationArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedModel:
    """The pretrained model with a new head, in float32, whatever precision the checkpoint was exported in."""
    config = open_config(args.model)
    check_fit(config, num_ids=len(tokenizer), block_size=args.block_size)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",
        dtype=torch.float32,
        **({"classifier_pooling": args.pooling} if isinstance(config, GPTConfig) else {}),
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def encode(data: LabelledTexts, tokenizer: PreTrainedTokenizerBase, names: list[str], block_size: int) -> Dataset:
    """Token ids as `pipeline` will make them; a text longer than block_size loses its end, and its last token is a
    token of the text still."""
    ids = tokenizer(data.texts, truncation=False, verbose=False)["input_ids"]
    return Dataset.from_dict(
        {
            "input_ids": [row[:block_size] for row in ids],
            "length": [min(len(row), block_size) for row in ids],
            "num_cut": [max(0, len(row) - block_size) for row in ids],
            "labels": [names.index(label) for label in data.labels],
        }
    )


def describe_lengths(parts: list[Dataset], block_size: int) -> str:
    lengths = np.concatenate([part["length"] for part in parts])
    cut = np.concatenate([part["num_cut"] for part in parts])
    text = f"Lengths in tokens: median {np.median(lengths):.0f}, 95 % at most {np.quantile(lengths, 0.95):.0f}"
    if not cut.any():
        return f"{text}, longest {lengths.max():,}; none is cut (block_size {block_size:,})."
    return (
        f"{text}. {np.count_nonzero(cut):,} texts are longer than block_size {block_size:,} and lose their end, "
        f"{cut.sum():,} of {lengths.sum() + cut.sum():,} tokens."
    )


def training_arguments(args: ClassificationArguments) -> TrainingArguments:
    own = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = {name: value for name, value in vars(args).items() if name in own - {"gradient_checkpointing"}}
    return TrainingArguments(
        **{
            **shared,
            "output_dir": str(Path(args.output_dir) / "checkpoints"),
            "max_steps": args.max_steps or -1,
            "report_to": trackers(args.report_to),
            "activation_checkpointing": args.gradient_checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not sys.stderr.isatty(),
            "use_cpu": not torch.accelerator.is_available(),
            "remove_unused_columns": False,
        }
    )


def collate_with(tokenizer: PreTrainedTokenizerBase):
    """Rows -> a batch padded to its longest text."""
    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: pad([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])


def score_for_trainer(prediction, names: list[str]) -> dict[str, float]:
    scores = score_predictions(prediction.predictions, prediction.label_ids, names)
    return {name: scores[name] for name in ("accuracy", "f1_macro")}


def predict(args: ClassificationArguments, model: PreTrainedModel, rows: Dataset, collate) -> np.ndarray:
    """The model's logits (rows, labels), each row once, however many processes share the work."""
    arguments = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "checkpoints"),
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        bf16=args.bf16,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    logits = Trainer(model=model, args=arguments, data_collator=collate).predict(rows).predictions
    assert len(logits) == len(rows)
    return logits


def finish(
    args: ClassificationArguments,
    names: list[str],
    parts: tuple[LabelledTexts, ...],
    logits: dict[str, np.ndarray],
    metrics: dict[str, Any],
) -> None:
    """Score the predictions beside the baselines, write `metrics.json` and the picture, and tell."""
    output_dir = Path(args.output_dir)
    texts = {name: (part.texts, [names.index(label) for label in part.labels]) for name, part in zip(PARTS, parts)}
    metrics |= score_beside_baselines(logits, texts, names)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    title = f"{output_dir.resolve().name}: {metrics['test_texts']:,} test texts"
    test = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
    plot_confusion(test, names, output_dir / "confusion.png", title=title)
    write_page_and_card(output_dir)

    print(f"\n{describe_scores(metrics)}")
    text = parts[2].texts[0].split("\n")[0][:60]
    adapter = (
        f"\n{output_dir}/adapter          what LoRA learned, to stand on its base" if args.method == "lora" else ""
    )
    waste = metrics["padding_waste"]
    speed = (
        ""
        if waste is None
        else f", {metrics['tokens_per_second']:,.0f} tokens/s; {waste:.1%} of the batches was padding"
    )
    print(f"""
{metrics["train_tokens"]:,} tokens in {metrics["train_seconds"]:,.0f} seconds{speed}.

{output_dir}                  the model with what it learned merged in, and its tokenizer{adapter}
{output_dir}/confusion.png    what it confuses, and how far its confidence can be believed
{output_dir}/report.html      the run's page, to open in a browser
{output_dir}/metrics.json     all numbers; log.jsonl has the course

Next, in Python:
    import hfllm; from transformers import pipeline
    pipeline("text-classification", {str(output_dir)!r})({text!r}, truncation=True)""")


if __name__ == "__main__":
    run(main, ClassificationArguments, description=__doc__)
