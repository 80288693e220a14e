"""Measure models on held-out data, side by side: text, conversations, labelled texts, and lm-eval's tasks.

    python recipes/evaluate_model.py --model out/demo --dataset stdlib --validation_fraction 0.02
    python recipes/evaluate_model.py --model out/demo openai-community/gpt2 --dataset held-out.jsonl
    python recipes/evaluate_model.py --model out/base --adapter out/lora --dataset held-out.jsonl --stride 128
    python recipes/evaluate_model.py --model out/demo --tasks my_task --include_path my_tasks
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/evaluate_model.py --model out/demo \\
        --dataset held-out.jsonl
    python recipes/evaluate_model.py --model out/chat out/assistant --dataset held-out.json \\
        --conversations --check_answers
    python recipes/evaluate_model.py --model out/spam out/spam-lora --dataset test.csv --label_column label
    python recipes/evaluate_model.py --model out/topics --dataset test.csv --label_column topics --label_separator ,

Every token of every document is predicted once, the first from the tokenizer's start token (as in lm-eval's rolling
log-likelihood), in windows of `--block_size` tokens; a smaller `--stride` gives each token more context. Compare models
with different tokenizers by bits per byte. In conversations (`--conversations`) only the responses count, in nats per
token, and `--check_answers` compares greedy replies with them. Classifiers are scored on labelled texts, with the same
numbers as in finetune_classification.py. The numbers are added to `metrics.json` in the model's folder or in
`--output_dir`.
"""

from pathlib import Path
from typing import Any, Literal

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm, open_classifier, open_config
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data import load_corpus, split_documents
from hfllm.data.conversations import Conversation, load_conversations
from hfllm.data.labelled_texts import LabelledTexts, load_labelled_texts
from hfllm.data.sources import local_paths
from hfllm.evaluation.classification import score_labelled_texts
from hfllm.evaluation.kinds import Kind, check_labels, find_kind, problem_type_of
from hfllm.evaluation.replies import score_conversations
from hfllm.evaluation.tasks import find_tasks, run_tasks
from hfllm.evaluation.windows import score_documents
from hfllm.hub import write_page_and_card
from hfllm.report.metrics import add_metrics, metrics_table, read_metrics
from hfllm.runs.files import open_output_dir
from hfllm.runs.lock import run_lock
from hfllm.runs.processes import on_main_process
from hfllm.tokenization import document_encoder, load_classifier_tokenizer, load_tokenizer
from hfllm.training.devices import start_accelerator

import datasets
import torch
from accelerate import Accelerator, DistributedType
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


@arguments
class EvaluateArguments(
    groups.HubDataset,
    groups.TextColumn,
    groups.DocumentSeparator,
    groups.LabelColumn,
    groups.ColumnMap,
    groups.ValidationFraction,
    groups.BlockSize,
    groups.LongTexts,
    groups.Cache,
    groups.Model,
    groups.Adapter,
    groups.Dtype,
    groups.RemoteCode,
    groups.EvalBatch,
    groups.Replies,
    groups.NewTokens,
    groups.OutputDir,
    groups.Config,
):
    # Text
    dataset = differs(None, help="Hub id, files or folders to score, or 'stdlib'.")
    split = differs("test", help="Split of the Hub dataset; local files are read whole.")
    label_column = differs(help="Column or JSON key of the label, for classifiers.")
    conversations: bool = option(False, section="text", help="The rows are conversations: score the responses only.")
    validation_fraction = differs(
        0.0, help="Score only what pretrain.py holds out with this fraction; 0: all documents."
    )
    block_size = differs(help="Tokens per window or row.", default_is="the model's context, at most 1,024")
    stride = differs(
        help="New tokens per further window.", default_is="that of training for classifiers, or block_size"
    )
    long_texts = differs(None, help="For classifiers: cut long texts, or average windows.", default_is="as in training")
    tasks: list[str] | None = option(None, section="lm-eval", help="Tasks of lm-eval (pip install -e '.[interop]').")
    include_path: str | None = option(
        None, section="lm-eval", help="Folder of your own tasks (YAML files).", location=Location.READ
    )
    limit: int | None = option(None, section="lm-eval", help="Most examples of each task, for a first try.", at_least=1)

    # Models
    model: list[str] = differs(
        default_factory=lambda: ["out/demo"], help="Folders or Hub ids, all causal models or all classifiers."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = differs("float32")

    # Evaluation and output
    per_device_eval_batch_size = differs(8, help="Windows, rows or texts per device and forward pass.")
    output_dir = differs(help="Folder of metrics.json.", default_is="the model's folder")

    def check(self) -> None:
        """Reject out-of-range values and options that exclude each other, all at once."""
        check_numbers(self)
        names = [Path(name).name for name in self.model]
        problems = [
            (
                self.dataset is None and not self.tasks,
                "Nothing to measure on: give --dataset, --tasks or both.",
            ),
            (
                self.adapter is not None and len(self.model) > 1,
                "An --adapter belongs to one --model; several are given.",
            ),
            (
                self.block_size is not None and (self.stride or 1) > self.block_size,
                f"--stride {self.stride} is larger than --block_size {self.block_size}: tokens would be left out.",
            ),
            (
                self.output_dir is not None and len(set(names)) < len(names),
                f"--output_dir gets a folder for each model, but their names are {names}. Leave it out.",
            ),
            (
                not self.conversations and (self.check_answers or self.column_map is not None),
                "--check_answers and --column_map are for conversations: give --conversations as well.",
            ),
            (
                self.conversations and self.dataset in (None, "stdlib"),
                "--conversations needs a --dataset of rows held back from training. Most questions of 'stdlib' are "
                "trained on; the numbers of its test part are in finetune_instruction.py's metrics.json.",
            ),
            (
                self.conversations and (self.stride is not None or self.validation_fraction != 0),
                "--stride and --validation_fraction are for text; a conversation is scored whole.",
            ),
            (
                self.conversations and (self.text_column, self.label_column) != ("text", "label"),
                "--text_column and --label_column are not for conversations, whose columns --column_map renames.",
            ),
            (
                self.conversations and (self.label_separator is not None or self.long_texts is not None),
                "--label_separator and --long_texts are for classifiers, not for conversations.",
            ),
            (
                not self.tasks and (self.limit is not None or self.include_path is not None),
                "--limit and --include_path are for lm-eval's tasks: give --tasks as well.",
            ),
            (
                not self.check_answers and self.max_new_tokens != EvaluateArguments.max_new_tokens,
                "--max_new_tokens is the length of a reply: give --check_answers as well.",
            ),
            (
                len(set(self.model)) < len(self.model),
                f"--model {' '.join(self.model)}: one of them is given twice.",
            ),
        ]
        if messages := [message for is_wrong, message in problems if is_wrong]:
            raise ValueError("\n".join(messages))


def main(args: EvaluateArguments) -> None:
    args.check()
    disable_progress_bar()
    accelerator = start_accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "The accelerate file shards the model (FSDP, DeepSpeed), but each process needs a whole one. Use "
            "accelerate_configs/ddp.yaml or multi_cpu.yaml."
        )
    opened = {"adapter": args.adapter, "trust_remote_code": args.trust_remote_code}
    configs = {name: open_config(name, **opened) for name in args.model}
    kind = find_kind(configs)
    check_options_of(kind, args)
    task_manager = find_tasks(args.tasks, include_path=args.include_path) if args.tasks else None

    # 1. The data: the same for every model
    data = load_data(args, kind, accelerator, configs)
    if isinstance(data, LabelledTexts):
        for name, config in configs.items():
            check_labels(name, config, data)

    folders = {name: folder_of_numbers(name, args) for name in args.model}
    on_main_process(accelerator, lambda: check_folders(folders))

    results: dict[str, dict[str, Any]] = {}
    for name in args.model:
        # 2. The model, with its own tokenizer
        tokenizer = open_tokenizer(name, kind, args)
        model = open_model(name, kind, configs[name], args).to(accelerator.device).eval()

        # 3. Every token, response or text is scored once, by all processes together
        results[name] = {} if data is None else score(model, tokenizer, data, args, accelerator)

        # 4. lm-eval's tasks, on the main process
        if task_manager is not None and accelerator.is_main_process:
            options = {"names": args.tasks, "batch_size": args.per_device_eval_batch_size, "limit": args.limit}
            results[name] |= run_tasks(model, tokenizer, task_manager, **options)
        accelerator.wait_for_everyone()

        # 5. The numbers go into metrics.json, beside the numbers of training
        if accelerator.is_main_process:
            save_numbers(folders[name], name, results[name])
    if accelerator.is_main_process:
        print(f"\n{metrics_table(results)}")


def check_options_of(kind: Kind, args: EvaluateArguments) -> None:
    """Refuse the options that are for models of the other kind."""
    if kind == "causal":
        for name in ("label_column", "label_separator", "long_texts"):
            if (value := getattr(args, name)) not in (None, "label"):
                raise ValueError(f"--{name} {value} is for classifiers; {args.model[0]} is a causal model.")
        return
    given = [
        (bool(args.tasks), "--tasks"),
        (args.conversations, "--conversations"),
        (args.validation_fraction != 0, "--validation_fraction"),
    ]
    if wrong := [option for is_given, option in given if is_given]:
        raise ValueError(f"{', '.join(wrong)}: for causal models. {args.model[0]} is a classifier.")
    if args.stride is not None and args.long_texts != "window":
        raise ValueError(f"--stride {args.stride} is for windows: give --long_texts window as well.")
    if args.dataset == "stdlib":
        raise ValueError(
            "--dataset stdlib: a classifier is trained on most of its docstrings. Give labelled texts that were held "
            "back from training; the metrics.json of finetune_classification.py has the numbers of its test texts."
        )


def load_data(
    args: EvaluateArguments, kind: Kind, accelerator: Accelerator, configs: dict[str, PretrainedConfig]
) -> datasets.Dataset | list[Conversation] | LabelledTexts | None:
    """Documents (parts in the columns `text` and `document`), conversations, or labelled texts."""
    if args.dataset is None:
        return None
    is_local = local_paths(args.dataset, dataset_config=None, split="train") is not None
    if is_local and args.split != "test":
        raise ValueError(
            f"--split {args.split}: only datasets on the Hub have splits; {args.dataset} is local and read whole. "
            "Name the files to score."
        )
    options: dict[str, Any] = {"dataset_config": args.dataset_config, "split": "train" if is_local else args.split}
    options["delimiter"] = args.delimiter
    with accelerator.main_process_first():
        if kind == "classifier":
            columns = groups.values_of(args, groups.TextColumn, groups.LabelColumn)
            problem_type = problem_type_of(configs[args.model[0]])
            return load_labelled_texts(args.dataset, problem_type=problem_type, **options, **columns)
        if args.conversations:
            pairs = [each.partition("=") for each in args.column_map or []]
            if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
                raise ValueError(f"--column_map {wrong[0]}: give name=meaning, e.g. question=prompt answer=response")
            column_map = {name: meaning for name, _, meaning in pairs}
            return load_conversations(args.dataset, column_map=column_map, **options).rows
        options |= {"text_column": args.text_column, "document_separator": args.document_separator}
        corpus = load_corpus(args.dataset, cache_dir=args.cache_dir, **options)
    if args.validation_fraction == 0:
        return corpus.documents
    return split_documents(corpus, validation_fraction=args.validation_fraction)[1]


def open_tokenizer(name: str, kind: Kind, args: EvaluateArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the adapter's, which may have a chat template that the base lacks."""
    if kind == "classifier":
        return load_classifier_tokenizer(name)
    if args.adapter is None:
        return load_tokenizer(name)
    from hfllm.adapters import tokenizer_source  # imports PEFT

    return load_tokenizer(tokenizer_source(name, str(Path(args.adapter).expanduser())))


def open_model(name: str, kind: Kind, config: PretrainedConfig, args: EvaluateArguments) -> PreTrainedModel:
    """The model in `--dtype`, with its adapter if there is one; an adapter of another base is refused."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "trust_remote_code": args.trust_remote_code}
    if kind == "classifier":
        model = open_classifier(name, config=config, **options)
    else:
        model = open_causal_lm(name, **options)
    if args.adapter is None:
        return model
    from hfllm.adapters import load_adapter  # imports PEFT

    folder = Path(args.adapter).expanduser()
    return load_adapter(model, folder if folder.is_dir() else args.adapter)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset | list[Conversation] | LabelledTexts,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The `test_...` numbers of a model on the data."""
    options: dict[str, Any] = {"batch_size": args.per_device_eval_batch_size, "accelerator": accelerator}
    if isinstance(data, LabelledTexts):
        # Read as many tokens of a text as in training: the saved tokenizer has that length
        block_size = choose_block_size(model, args, at_most=tokenizer.model_max_length)
        options |= {"block_size": block_size, "stride": choose_window_stride(tokenizer, args, block_size)}
        numbers = score_labelled_texts(model, tokenizer, data, **options)
        if options["stride"] is not None:
            numbers["test_stride"] = options["stride"]
    elif isinstance(data, list):
        block_size = choose_block_size(model, args, at_most=1024)
        max_new_tokens = args.max_new_tokens if args.check_answers else None
        numbers = score_conversations(
            model, tokenizer, data, block_size=block_size, max_new_tokens=max_new_tokens, **options
        )
    else:
        block_size = choose_block_size(model, args, at_most=1024)
        stride = args.stride or block_size
        if stride > block_size:
            raise ValueError(f"--stride {stride} is larger than the block_size {block_size}: tokens would be left out.")
        numbers = score_documents(
            model,
            tokenizer,
            data,
            encode=document_encoder(tokenizer),
            block_size=block_size,
            stride=stride,
            **options,
        )
    return numbers | {"test_dataset": args.dataset, "test_block_size": block_size}


def choose_block_size(model: PreTrainedModel, args: EvaluateArguments, *, at_most: int) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    block_size = args.block_size or min(context or 1024, at_most)
    if context is not None and block_size > context:
        raise ValueError(f"--block_size {block_size} is more than the model's context of {context}.")
    return block_size


def choose_window_stride(tokenizer: PreTrainedTokenizerBase, args: EvaluateArguments, block_size: int) -> int | None:
    """Tokens between the starts of a long text's windows, as in training unless it is given; None: it loses its end."""
    trained = tokenizer.init_kwargs.get("window_stride")
    long_texts = args.long_texts or ("cut" if trained is None else "window")
    if long_texts == "cut":
        return None
    stride = args.stride or min(trained or block_size, block_size)
    if stride > block_size:
        raise ValueError(f"--stride {stride} is larger than the block_size {block_size}: tokens would be left out.")
    return stride


def folder_of_numbers(name: str, args: EvaluateArguments) -> Path | None:
    """Whose metrics.json gets a model's numbers: --output_dir, the adapter's folder or the model's, if it has one."""
    if args.output_dir is not None:
        return Path(args.output_dir) / (Path(name).name if len(args.model) > 1 else "")
    folder = Path(name if args.adapter is None else args.adapter)
    return folder if folder.is_dir() else None


def check_folders(folders: dict[str, Path | None]) -> None:
    """Refuse a folder that cannot take the numbers, before they are measured."""
    for folder in folders.values():
        if folder is not None:
            read_metrics(open_output_dir(folder))


def save_numbers(folder: Path | None, name: str, numbers: dict[str, Any]) -> None:
    """Add the numbers to the metrics.json of the folder, and to a run's card."""
    if folder is None:
        print(f"{name} is not a local folder, so its numbers are only printed. Give --output_dir to save them.")
        return
    try:
        with run_lock(folder, recipe="evaluate_model"):
            print(add_metrics(folder, numbers))
            if (folder / "arguments.yaml").exists():  # a run's folder
                write_page_and_card(folder)
    except RuntimeError as error:  # a run has begun to work there
        print(f"The numbers of {name} are only printed: {error}")


if __name__ == "__main__":
    run(main, EvaluateArguments, description=__doc__)
