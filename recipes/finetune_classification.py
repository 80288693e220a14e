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

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from hfllm.adapters import add_lora, count_parameters, describe_trained
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run
from hfllm.cli.opening import check_fit, open_classifier, open_config
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.labelled_texts import (
    LabelledTexts,
    balance_labels,
    check_labels_known,
    describe_labelled_texts,
    join_labelled_texts,
    label_names,
    load_labelled_texts,
    split_by_text,
)
from hfllm.data.sources import named_datasets
from hfllm.evaluation.classification import describe_scores, predict_logits, score_beside_baselines, score_predictions
from hfllm.fine_tuning.classification import ClassifierTrainer, freeze_all_but
from hfllm.fine_tuning.run import open_run, training_arguments
from hfllm.model import GPTConfig
from hfllm.report.confusion import plot_confusion
from hfllm.runs.finite import check_converged
from hfllm.tokenization import load_classifier_tokenizer
from hfllm.training.devices import check_precision

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


# By method, for models of fewer than 512 channels and for larger ones. The first rates are for the demo's model: `lora`
# and `full` were chosen on validation texts (see the configs), `last_block` and `head` were not tuned separately. The
# second rates are the book's for GPT-2 with 124 million parameters, where it has them. LoRA starts from a product of
# zero and tolerates a higher rate. The head is new and starts from random weights.
SMALL = 512
LEARNING_RATES = {"lora": (2e-3, 8e-4), "full": (2e-4, 5e-5), "last_block": (1e-3, 2e-4)}
HEAD_LEARNING_RATES = {"lora": (1e-2, 8e-4), "full": (5e-3, 5e-5), "last_block": (1e-2, 2e-4), "head": (1e-2, 5e-3)}
BY_METHOD, HEAD_BY_METHOD = (
    ", ".join(f"{method} {small:g} / {large:g}" for method, (small, large) in rates.items())
    for rates in (LEARNING_RATES, HEAD_LEARNING_RATES)
)
EVALUATION = (
    "epoch {epoch:.1f}, validation loss {eval_loss:.4f}, accuracy {eval_accuracy:.2%}, macro-F1 {eval_f1_macro:.3f}"
)


@arguments
class ClassificationArguments(
    groups.TrainingDataset,
    groups.ValidationDataset,
    groups.ValidationSplit,
    groups.TestFraction,
    groups.TestDataset,
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
    validation_dataset = differs(help="Labelled texts to choose the epoch by: files or a Hub id.")
    test_fraction = differs(0.2, help="Share of the texts held out for the test.")
    test_split: str | None = option(
        None, section="text", help="Split of the Hub dataset to test on.", default_is="see test_fraction"
    )
    test_dataset = differs(help="Labelled texts to test on: files or a Hub id.")
    label_column = differs(help="Column or JSON key of the label, a text or a whole number.")
    balance: bool = option(
        False, section="text", help="Use as many texts of each label as the rarest label has, as the book does."
    )
    split_seed: int = option(
        0, section="text", help="Random seed of the split and of balance.", at_least=0, at_most=2**32 - 1
    )
    block_size = differs(help="Tokens of a text that are read; longer texts are cut at the end.", at_least=2)

    # Model
    model = differs(help="Folder or Hub id of the pretrained model, with its tokenizer.")
    pooling: Literal["last", "mean", "mean_first_last"] | None = option(
        None,
        section="model",
        help="Input of the classification head: the last token's state, the mean of all states, or that mean plus "
        "the mean of the embeddings. Other architectures than hfllm's have the last token's only.",
        default_is="mean_first_last for hfllm models, last for others",
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
        at_most=10,
        help="Highest learning rate of the new head and, with method full, of the token embeddings.",
        default_is=HEAD_BY_METHOD,
        at_least=0,
    )
    label_smoothing_factor: float = option(
        0.0, section="optimization", help="Share of the target spread over all labels.", at_least=0, below=1
    )
    train_sampling_strategy: Literal["group_by_length", "random"] = option(
        "group_by_length", section="optimization", help="Batches of texts of similar length, or of random texts."
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
    with open_run(args, recipe="finetune_classification") as this_run:
        # 1. The texts: read, checked and split before anything is trained
        train, validation, test = load_parts(args)
        names = label_names(train.labels)
        check_labels_known(names, validation=validation, test=test)

        # 2. The model, with a new head that has one output for each label. The head reads the last token of a text,
        #    the only one that has seen all of it, or a mean over all tokens; the attention mask says which are text.
        tokenizer = load_classifier_tokenizer(args.model)
        model = open_model(args, tokenizer, names)
        block_size = args.block_size or model.config.max_position_embeddings
        tokenizer.model_max_length = block_size
        rows = {
            name: encode(part, tokenizer, names, block_size)
            for name, part in (("train", train), ("eval", validation), ("test", test))
        }
        learned = {name: [names, *zip(side["input_ids"], side["labels"], strict=True)] for name, side in rows.items()}
        if this_run.is_finished(model, tokenizer, learned):
            return
        if this_run.is_main:
            print(describe_labelled_texts(train, validation, test, names))
            print(describe_lengths(list(rows.values()), block_size))

        # 3. What is trained: LoRA's matrices and the head, or the part of the model that the method names
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
        if this_run.is_main:
            print(describe_trained(model))

        # 4. Training. Texts of similar lengths share a batch, padded to the longest of them. After each epoch the
        #    validation loss is measured, and at the end the best epoch is loaded.
        trainer = make_trainer(args, model, tokenizer, rows, names)
        this_run.begin(trainer, EVALUATION.format_map)
        seconds = this_run.train(trainer)

        # 5. The model with LoRA merged into it is saved, and tested as saved.
        with this_run.writing() as folder:
            model = this_run.save_model(trainer, tokenizer, folder)
            logits = {
                name: predict_logits(
                    model,
                    list(rows[name]["input_ids"]),
                    num_labels=len(names),
                    batch_size=args.per_device_eval_batch_size,
                    pad_token_id=tokenizer.pad_token_id,
                    accelerator=trainer.accelerator,
                )
                for name in ("eval", "test")
            }

            # 6. The numbers, beside a logistic regression's
            metrics = describe_training(args, trainer, seconds)
            metrics |= {"num_trained_parameters": num_trained, "num_parameters": count_parameters(model)[1]}
            if this_run.is_main:
                parts = {"train": train, "eval": validation, "test": test}
                ids = {
                    name: (part.texts, [names.index(label) for label in part.labels]) for name, part in parts.items()
                }
                metrics |= score_beside_baselines(logits, ids, names)
                metrics |= score_by_name(logits, {name: parts[name] for name in logits}, ids)
                check_converged(metrics["eval_loss"], num_choices=len(names))
                draw_confusion(metrics, names, folder, run_name=this_run.output_dir.resolve().name)
            this_run.save_metrics(metrics, folder)
        this_run.finish(trainer)
        if this_run.is_main:
            report(args, metrics, this_run.output_dir, example=test.texts[0])


def score_by_name(
    logits: dict[str, np.ndarray], parts: dict[str, LabelledTexts], ids: dict[str, tuple[list[str], list[int]]]
) -> dict[str, float]:
    """The accuracy on each of several validation or test datasets."""
    scores = {}
    for side, part in parts.items():
        is_right = logits[side].argmax(-1) == np.array(ids[side][1])
        for name, rows in part.named_rows.items():
            scores[f"{side}_accuracy_{name}"] = float(is_right[rows.start : rows.stop].mean())
    return scores


def choose_for_model(args: ClassificationArguments) -> tuple[str, float, float]:
    """The pooling and the two learning rates, as given or by default for this model.

    Only hfllm's own classifiers can use a mean over a text's tokens; transformers' classes use the last token.
    """
    config = open_config(args.model)
    is_ours = isinstance(config, GPTConfig)
    if args.pooling not in (None, "last") and not is_ours:
        raise ValueError(
            f"--pooling {args.pooling}: {args.model} is a {config.model_type}, whose classifier in transformers reads "
            "the last token. Leave --pooling out, or convert the model first: recipes/export.py --to hfllm."
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
    """The texts to train on, to validate on and to test on: given files or splits, or parts of the dataset."""
    options = {name: getattr(args, name) for name in ("text_column", "label_column", "on_bad_record", "delimiter")}
    options["exclude"] = [args.output_dir]
    data = load_labelled_texts(args.dataset, dataset_config=args.dataset_config, split=args.split, **options)
    label_names(data.labels)
    given: dict[str, LabelledTexts | None] = {}
    for name in ("validation", "test"):
        dataset, split = getattr(args, f"{name}_dataset"), getattr(args, f"{name}_split")
        if dataset is not None:
            parts = {part: load_labelled_texts(each, **options) for part, each in named_datasets(dataset).items()}
            given[name] = join_labelled_texts(parts)
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
                f"{len(data):,} texts are too few: none is left to {name}. Give more texts, or larger fractions."
            )
    return parts


def open_model(args: ClassificationArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedModel:
    """The model with a head for these labels, in float32 for training, whatever precision it was saved in.

    The head is new, unless the model is a classifier for the same labels already.
    """
    config = open_config(args.model)
    check_fit(config, num_ids=len(tokenizer), block_size=args.block_size)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    if isinstance(config, GPTConfig):
        config.classifier_pooling = args.pooling
    model = open_classifier(args.model, config=config, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def encode(data: LabelledTexts, tokenizer: PreTrainedTokenizerBase, names: list[str], block_size: int) -> Dataset:
    """Token ids as in `pipeline`. A text longer than block_size is cut at its end, and no token is added to it."""
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
        return f"{text}, longest {lengths.max():,}; no text is cut (block_size {block_size:,})."
    return (
        f"{text}. {np.count_nonzero(cut):,} texts are longer than block_size {block_size:,} and cut at the end, "
        f"{cut.sum():,} of {lengths.sum() + cut.sum():,} tokens."
    )


def make_trainer(
    args: ClassificationArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, Dataset],
    names: list[str],
) -> ClassifierTrainer:
    pad = DataCollatorWithPadding(tokenizer)
    return ClassifierTrainer(
        model=model,
        args=training_arguments(
            args,
            activation_checkpointing=args.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        data_collator=lambda batch: pad([{name: row[name] for name in ("input_ids", "labels")} for row in batch]),
        compute_metrics=lambda prediction: score_for_trainer(prediction, names),
        head_learning_rate=args.head_learning_rate,
    )


def score_for_trainer(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    scores = score_predictions(prediction.predictions, prediction.label_ids, names)
    return {name: scores[name] for name in ("accuracy", "f1_macro")}


def describe_training(args: ClassificationArguments, trainer: ClassifierTrainer, seconds: float) -> dict[str, Any]:
    """Cost of the training, for `metrics.json`; for a resumed run, tokens and seconds since the resume."""
    num_tokens, num_places = trainer.count_tokens()
    evaluating = sum(entry.get("eval_runtime", 0) for entry in trainer.state.log_history)
    return {
        "method": args.method,
        "train_texts": len(trainer.train_dataset),
        "train_tokens": num_tokens,
        "padding_waste": 1 - num_tokens / num_places if num_tokens else None,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": num_tokens / (seconds - evaluating) if num_tokens else None,
        "train_steps": trainer.state.global_step,
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
        "seed": args.seed,
    }


def draw_confusion(metrics: dict[str, Any], names: list[str], folder: Path, *, run_name: str) -> None:
    title = f"{run_name}: {metrics['test_texts']:,} test texts"
    test = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
    plot_confusion(test, names, folder / "confusion.png", title=title)


def report(args: ClassificationArguments, metrics: dict[str, Any], output_dir: Path, *, example: str) -> None:
    print(f"\n{describe_scores(metrics)}")
    speed = ""
    if metrics["train_tokens"]:
        speed = (
            f", {metrics['tokens_per_second']:,.0f} tokens/s; {metrics['padding_waste']:.1%} of the batches was padding"
        )
    adapter = (
        f"\n{output_dir}/adapter          LoRA's matrices alone, to load on the base" if args.method == "lora" else ""
    )
    text = example.split("\n")[0][:60]
    print(f"""
{metrics["train_tokens"]:,} tokens in {metrics["train_seconds"]:,.0f} seconds{speed}.

{output_dir}                  the model, with everything it learned merged in, and its tokenizer{adapter}
{output_dir}/confusion.png    which labels it confuses, and how far its confidence can be trusted
{output_dir}/report.html      the run's page, to open in a browser
{output_dir}/metrics.json     all numbers; log.jsonl has the losses of each step

Next, in Python:
    import hfllm; from transformers import pipeline
    pipeline("text-classification", {str(output_dir)!r})({text!r}, truncation=True)""")


if __name__ == "__main__":
    run(main, ClassificationArguments, description=__doc__)
