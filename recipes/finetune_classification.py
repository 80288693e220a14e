"""Chapter 6 and appendix E: fine-tune a pretrained model to put texts into classes.

On a laptop, offline: which package of Python's standard library does a docstring come from?

    python recipes/finetune_classification.py --config recipes/configs/classification_stdlib.yaml \\
        --model out/demo --output_dir out/classifier

The book's spam messages, or a table of your own (.csv, .tsv, .jsonl, .json, .parquet, or an id on the Hub):

    python recipes/finetune_classification.py --config recipes/configs/classification_sms.yaml \\
        --model openai-community/gpt2 --output_dir out/spam
    python recipes/finetune_classification.py --model out/demo --dataset mine.csv --text_column message \\
        --label_column topic --output_dir out/topics

Several labels at once (lists, or cells such as `a, b`), a number instead of a label, and documents longer than the
model's context:

    python recipes/finetune_classification.py --model out/demo --dataset mine.csv --label_column topics \\
        --label_separator , --output_dir out/topics
    python recipes/finetune_classification.py --model out/demo --dataset mine.csv --label_column stars \\
        --problem_type regression --output_dir out/stars
    python recipes/finetune_classification.py --model out/demo --dataset articles.jsonl --long_texts window \\
        --output_dir out/articles

On the GPUs of one machine:

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 recipes/finetune_classification.py \\
        --config recipes/configs/classification_sms.yaml --model openai-community/gpt2 --output_dir out/spam

The same command again resumes an interrupted run. `--help` explains every option.
"""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from hfllm.adapters import add_lora, count_parameters, describe_trained
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run
from hfllm.cli.opening import check_fit, has_head_for, open_classifier, open_config
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.labelled_texts import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    LabelledTexts,
    ProblemType,
    balance_labels,
    check_label_options,
    check_labels_known,
    describe_labelled_texts,
    join_labelled_texts,
    label_targets,
    load_labelled_texts,
    output_names,
    split_by_text,
)
from hfllm.data.sources import named_datasets
from hfllm.evaluation.classification import (
    EVALUATED,
    describe_scores,
    encode_windows,
    pool_windows,
    predict_logits,
    score_answers,
    score_beside_baselines,
)
from hfllm.fine_tuning.classification import ClassifierTrainer, freeze_all_but, start_at_mean
from hfllm.fine_tuning.run import open_run, training_arguments
from hfllm.model import GPTConfig
from hfllm.report.confusion import plot_confusion, plot_labels, plot_numbers
from hfllm.report.escaping import visible
from hfllm.runs.finite import check_converged, check_fit_of_numbers
from hfllm.tokenization import load_classifier_tokenizer
from hfllm.training.devices import check_precision

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
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
EVALUATION = {
    SINGLE_LABEL: "epoch {epoch:.1f}, validation loss {eval_loss:.4f}, accuracy {eval_accuracy:.2%}, macro-F1 "
    "{eval_f1_macro:.3f}",
    MULTI_LABEL: "epoch {epoch:.1f}, validation loss {eval_loss:.4f}, micro-F1 {eval_f1_micro:.3f}, macro-F1 "
    "{eval_f1_macro:.3f}, all labels right {eval_subset_accuracy:.2%}",
    REGRESSION: "epoch {epoch:.1f}, validation: mean squared error {eval_mse:.6g}, mean absolute error {eval_mae:.6g}",
}
PICTURES = {
    SINGLE_LABEL: ("confusion.png", "which labels it confuses, and how far its confidence can be trusted"),
    MULTI_LABEL: ("labels.png", "how well it finds each label"),
    REGRESSION: ("predictions.png", "the numbers that it says beside the true ones"),
}


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
    groups.LongTexts,
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
    label_column = differs(help="Column or JSON key of the label: a word, a whole number, a list of these, a number.")
    problem_type: ProblemType | None = option(
        None,
        section="text",
        help="Learn one label, several at once, or a number, in transformers' words.",
        default_is="several for lists or with label_separator, else one",
    )
    balance: bool = option(
        False, section="text", help="Use as many texts of each label as the rarest label has, as the book does."
    )
    split_seed: int = option(
        0, section="text", help="Random seed of the split and of balance.", at_least=0, at_most=2**32 - 1
    )
    block_size = differs(help="Tokens of a text that are read at once.", at_least=2)
    stride = differs(default_is="block_size")

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
        check_label_options(self.problem_type, self.label_separator)
        if self.problem_type is not None:
            self.check_problem_type()
        if self.stride is not None and self.long_texts != "window":
            raise ValueError("--stride is for --long_texts window, which reads long texts in windows.")
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

    def check_problem_type(self) -> None:
        """Refuse the options that are for one label a text, once it is known what the labels are."""
        only_for_one = {"balance": self.balance, "label_smoothing_factor": self.label_smoothing_factor}
        if self.problem_type != SINGLE_LABEL and (
            given := [f"--{name}" for name, is_on in only_for_one.items() if is_on]
        ):
            raise ValueError(
                f"{', '.join(given)}: only where a text has one label, and here problem_type is {self.problem_type}. "
                "Leave it out."
            )

    def choose_stride(self, block_size: int) -> int | None:
        """Tokens between the starts of the windows of a long text; None if its end is cut off."""
        stride = (self.stride or block_size) if self.long_texts == "window" else None
        if stride is not None and stride > block_size:
            raise ValueError(f"--stride {stride} is larger than the block_size {block_size}: tokens would be left out.")
        return stride


def main(args: ClassificationArguments) -> None:
    args.check()
    args.pooling, args.learning_rate, args.head_learning_rate = choose_for_model(args)
    with open_run(args, recipe="finetune_classification") as this_run:
        # 1. The texts: read, checked and split before anything is trained
        train, validation, test = load_parts(args)
        parts = {"train": train, "eval": validation, "test": test}
        names = output_names(train, label_column=args.label_column)
        check_labels_known(names, validation=validation, test=test)
        targets = {name: label_targets(part, names) for name, part in parts.items()}

        # 2. The model, with a head that has one output for each label, or one for the number; a new one, unless the
        #    model is a classifier for these labels already. The head reads the last token of a text, the only one that
        #    has seen all of it, or a mean over all tokens; the attention mask says which are text.
        tokenizer = load_classifier_tokenizer(args.model)
        model, is_new_head = open_model(args, tokenizer, names)
        target_scale = 1.0
        if args.problem_type == REGRESSION:
            target_scale = start_at_mean(model, targets["train"], is_new_head=is_new_head)
        block_size = args.block_size or model.config.max_position_embeddings
        tokenizer.model_max_length = block_size
        stride = args.choose_stride(block_size)
        if stride is not None:
            tokenizer.init_kwargs["window_stride"] = stride  # saved with it, for evaluate_model.py
        rows = {name: encode(part, tokenizer, names, block_size, stride) for name, part in parts.items()}
        learned = {name: [names, *zip(side["input_ids"], side["labels"], strict=True)] for name, side in rows.items()}
        if this_run.is_finished(model, tokenizer, learned):
            return
        if this_run.is_main:
            print(visible(describe_labelled_texts(train, validation, test, names)))
            print(describe_lengths(list(rows.values()), block_size, stride))

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
        trainer = make_trainer(args, model, tokenizer, rows, names, target_scale)
        this_run.begin(trainer, EVALUATION[args.problem_type].format_map)
        seconds = this_run.train(trainer)

        # 5. The model with LoRA merged into it is saved, and tested as saved. The logits of a text's windows are
        #    averaged.
        with this_run.writing() as folder:
            model = this_run.save_model(trainer, tokenizer, folder)
            logits = {}
            for name in ("eval", "test"):
                of_rows = predict_logits(
                    model,
                    list(rows[name]["input_ids"]),
                    num_labels=len(names),
                    batch_size=args.per_device_eval_batch_size,
                    pad_token_id=tokenizer.pad_token_id,
                    accelerator=trainer.accelerator,
                )
                logits[name] = pool_windows(of_rows, rows[name]["text_number"])

            # 6. The numbers, beside those of a regression on words
            metrics = describe_training(args, trainer, seconds) | {"train_texts": len(train)}
            metrics |= {"num_trained_parameters": num_trained, "num_parameters": count_parameters(model)[1]}
            if this_run.is_main:
                texts = {name: (part.texts, targets[name]) for name, part in parts.items()}
                metrics |= score_beside_baselines(logits, texts, names, problem_type=args.problem_type)
                metrics |= score_by_name(logits, {name: parts[name] for name in logits}, targets, names)
                check_learned(args, metrics, targets, num_labels=len(names))
                title = f"{this_run.output_dir.resolve().name}: {metrics['test_texts']:,} test texts"
                draw(args, metrics, names, folder, answers=(targets["test"], logits["test"]), title=title)
            this_run.save_metrics(metrics, folder)
        this_run.finish(trainer)
        if this_run.is_main:
            report(args, metrics, this_run.output_dir, example=test.texts[0])


def score_by_name(
    logits: dict[str, np.ndarray], parts: dict[str, LabelledTexts], targets: dict[str, np.ndarray], names: list[str]
) -> dict[str, float]:
    """The accuracy, the micro-averaged F1 or the mean absolute error on each of several validation or test datasets."""
    scores = {}
    main = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "f1_micro", REGRESSION: "mae"}
    for side, part in parts.items():
        for name, rows in part.named_rows.items():
            here = slice(rows.start, rows.stop)
            found = score_answers(logits[side][here], targets[side][here], names, problem_type=part.problem_type)
            scores[f"{side}_{main[part.problem_type]}_{name}"] = found[main[part.problem_type]]
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
    """The texts to train on, to validate on and to test on: given files or splits, or parts of the dataset.

    `args.problem_type` becomes what the labels are, if it was not given.
    """
    options: dict[str, Any] = groups.values_of(args, groups.TextColumn, groups.LabelColumn)
    options |= {"on_bad_record": args.on_bad_record, "delimiter": args.delimiter, "problem_type": args.problem_type}
    options["exclude"] = [args.output_dir]
    data = load_labelled_texts(args.dataset, dataset_config=args.dataset_config, split=args.split, **options)
    options["problem_type"] = args.problem_type = data.problem_type
    args.check_problem_type()
    output_names(data, label_column=args.label_column)
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


def open_model(
    args: ClassificationArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> tuple[PreTrainedModel, bool]:
    """The model with a head for these labels, in float32 for training, whatever precision it was saved in.

    The head is new, which is returned as well, unless the model is a classifier for the same labels already.
    """
    source = open_config(args.model)
    check_fit(source, num_ids=len(tokenizer), block_size=args.block_size)
    config = copy.deepcopy(source)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = args.problem_type
    if isinstance(config, GPTConfig):
        config.classifier_pooling = args.pooling
    model = open_classifier(args.model, config=config, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, not has_head_for(source, config)


def encode(
    data: LabelledTexts,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    block_size: int,
    stride: int | None = None,
) -> Dataset:
    """Rows of token ids as `pipeline` makes them, each with its text's label; see `encode_windows`."""
    ids, text_numbers, lengths = encode_windows(data.texts, tokenizer, block_size=block_size, stride=stride)
    targets = label_targets(data, names).tolist()
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "length": [len(row) for row in ids],
            "labels": [targets[number] for number in text_numbers],
            "text_number": text_numbers,
            "text_length": [lengths[number] for number in text_numbers],
        }
    )


def describe_lengths(parts: list[Dataset], block_size: int, stride: int | None = None) -> str:
    """How long the texts are, and what becomes of those that are longer than block_size."""
    is_first = [np.diff(part["text_number"], prepend=-1) > 0 for part in parts]
    lengths = np.concatenate([np.array(part["text_length"])[first] for part, first in zip(parts, is_first)])
    text = (
        f"Lengths in tokens: median {np.median(lengths):.0f}, 95 % at most {np.quantile(lengths, 0.95):.0f}, longest "
        f"{lengths.max():,}"
    )
    num_long = np.count_nonzero(lengths > block_size)
    if not num_long:
        return f"{text}; no text is longer than block_size {block_size:,}."
    if stride is not None:
        return (
            f"{text}. {num_long:,} of {len(lengths):,} texts are longer than block_size {block_size:,}, and are read "
            f"in windows that begin {stride:,} tokens apart: all texts are {sum(map(len, parts)):,} rows, the "
            f"{is_first[0].sum():,} training texts {len(parts[0]):,}."
        )
    cut = np.maximum(lengths - block_size, 0).sum()
    return (
        f"{text}. {num_long:,} texts are longer than block_size {block_size:,} and cut at the end, {cut:,} of "
        f"{lengths.sum():,} tokens (--long_texts window reads them whole)."
    )


def make_trainer(
    args: ClassificationArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, Dataset],
    names: list[str],
    target_scale: float = 1.0,
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
        score=lambda logits, targets: score_for_trainer(logits, targets, names, args.problem_type),
        head_learning_rate=args.head_learning_rate,
        target_scale=target_scale,
    )


def score_for_trainer(
    logits: np.ndarray, targets: np.ndarray, names: list[str], problem_type: ProblemType
) -> dict[str, float]:
    """The numbers of an evaluation during training; of a regression, the loss is the mean squared error."""
    scores = score_answers(logits, targets, names, problem_type=problem_type)
    chosen = {name: scores[name] for name in EVALUATED[problem_type] if scores[name] is not None}
    return {"loss": scores["mse"], **chosen} if problem_type == REGRESSION else chosen


def describe_training(args: ClassificationArguments, trainer: ClassifierTrainer, seconds: float) -> dict[str, Any]:
    """Cost of the training, for `metrics.json`; for a resumed run, tokens and seconds since the resume."""
    num_tokens, num_places = trainer.count_tokens()
    evaluating = sum(entry.get("eval_runtime", 0) for entry in trainer.state.log_history)
    return {
        "method": args.method,
        "train_rows": len(trainer.train_dataset),
        "train_tokens": num_tokens,
        "padding_waste": 1 - num_tokens / num_places if num_tokens else None,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": num_tokens / (seconds - evaluating) if num_tokens else None,
        "train_steps": trainer.state.global_step,
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
        "seed": args.seed,
    }


def check_learned(
    args: ClassificationArguments, metrics: dict[str, Any], targets: dict[str, np.ndarray], *, num_labels: int
) -> None:
    """Raise a FloatingPointError if the validation loss is far worse than that of a guess."""
    if args.problem_type == REGRESSION:
        variance = max(np.var(targets["train"]), np.square(targets["eval"] - np.mean(targets["train"])).mean())
        check_fit_of_numbers(metrics["eval_mse"], variance=float(variance))
    else:
        check_converged(metrics["eval_loss"], num_choices=2 if args.problem_type == MULTI_LABEL else num_labels)


def draw(
    args: ClassificationArguments,
    metrics: dict[str, Any],
    names: list[str],
    folder: Path,
    *,
    answers: tuple[np.ndarray, np.ndarray],
    title: str,
) -> None:
    """The picture of the test; `answers` are its targets and logits."""
    path = folder / PICTURES[args.problem_type][0]
    test = {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}
    if args.problem_type == SINGLE_LABEL:
        plot_confusion(test, names, path, title=title)
    elif args.problem_type == MULTI_LABEL:
        plot_labels(test, path, title=title)
    else:
        targets, logits = answers
        plot_numbers(targets, logits[:, 0], path, name=args.label_column, title=title)


def report(args: ClassificationArguments, metrics: dict[str, Any], output_dir: Path, *, example: str) -> None:
    print(f"\n{visible(describe_scores(metrics, problem_type=args.problem_type))}")
    speed = ""
    if metrics["train_tokens"]:
        speed = (
            f", {metrics['tokens_per_second']:,.0f} tokens/s; {metrics['padding_waste']:.1%} of the batches was padding"
        )
    adapter = (
        f"\n{output_dir}/adapter          LoRA's matrices alone, to load on the base" if args.method == "lora" else ""
    )
    text = example.split("\n")[0][:60]
    picture, shows = PICTURES[args.problem_type]
    every = ", top_k=None" if args.problem_type == MULTI_LABEL else ""
    print(f"""
{metrics["train_tokens"]:,} tokens in {metrics["train_seconds"]:,.0f} seconds{speed}.

{output_dir}                  the model, with everything it learned merged in, and its tokenizer{adapter}
{f"{output_dir}/{picture}":{len(str(output_dir)) + 17}} {shows}
{output_dir}/report.html      the run's page, to open in a browser
{output_dir}/metrics.json     all numbers; log.jsonl has the losses of each step

Next, in Python:
    import hfllm; from transformers import pipeline
    pipeline("text-classification", {str(output_dir)!r})({text!r}, truncation=True{every})""")


if __name__ == "__main__":
    run(main, ClassificationArguments, description=__doc__)
