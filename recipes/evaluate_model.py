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

Every token of every document is predicted once, the first from the tokenizer's start token (lm-eval's rolling
log-likelihood does so too), in windows of `--block_size` tokens; a smaller `--stride` gives each token more context.
Bits per byte is what models with different tokenizers share. Of conversations (`--conversations`) the responses alone
count, in nats per token, and `--check_answers` compares greedy replies with them. Classifiers are scored on labelled
texts, with the numbers of finetune_classification.py. The numbers go into `metrics.json` of the model's folder, or of
`--output_dir`, beside what training wrote there.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # what imports leave is no garbage, and looking through it takes a fifth of the start: until `run`

import json
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm, open_config
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data import load_corpus, split_documents
from hfllm.data.conversations import Conversation, load_conversations
from hfllm.data.instruction import ConversationRows, encode_conversations, padding_token_id
from hfllm.data.labelled_texts import LabelledTexts, load_labelled_texts
from hfllm.evaluation.classification import predict_logits, score_predictions
from hfllm.evaluation.replies import answer, exact_match, stop_at_turns
from hfllm.evaluation.rows import score_rows
from hfllm.evaluation.tasks import find_tasks, run_tasks
from hfllm.evaluation.windows import cut_windows, evaluate_windows
from hfllm.hub import write_page_and_card
from hfllm.report.metrics import add_metrics, metrics_table
from hfllm.tokenization import document_encoder, load_classifier_tokenizer, load_tokenizer
from hfllm.training.devices import start_accelerator


@arguments
class EvaluateArguments(
    groups.HubDataset,
    groups.TextColumn,
    groups.LabelColumn,
    groups.ColumnMap,
    groups.ValidationFraction,
    groups.BlockSize,
    groups.Stride,
    groups.Cache,
    groups.Model,
    groups.Adapter,
    groups.Dtype,
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
    stride = differs(help="New tokens per further window.", default_is="block_size")
    tasks: list[str] | None = option(None, section="lm-eval", help="Tasks of lm-eval (pip install -e '.[interop]').")
    include_path: str | None = option(
        None, section="lm-eval", help="Folder of your own tasks, YAML files.", location=Location.READ
    )
    limit: int | None = option(None, section="lm-eval", help="Most examples of each task, for a first try.", at_least=1)

    # Models
    model: list[str] = differs(
        default_factory=lambda: ["out/demo"], help="Folders or Hub ids, all causal models or all classifiers."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = differs("float32")
    trust_remote_code: bool = option(False, section="model", help="Run the code that comes with a model.")

    # Evaluation and output
    per_device_eval_batch_size = differs(8, help="Windows, rows or texts per device and forward pass.")
    output_dir = differs(help="Folder of metrics.json.", default_is="the model's folder")

    def check(self) -> None:
        """Reject out-of-range values and options that exclude each other, all at once."""
        check_numbers(self)
        names = [Path(name).name for name in self.model]
        problems = [
            (self.dataset is None and not self.tasks, "Measure on what? Give --dataset, --tasks or both."),
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
                "--conversations needs a --dataset of rows held back from training. Of 'stdlib' most questions are "
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
                not self.tasks and (self.limit is not None or self.include_path is not None),
                "--limit and --include_path are for lm-eval's tasks: give --tasks as well.",
            ),
            (
                not self.check_answers and self.max_new_tokens != EvaluateArguments.max_new_tokens,
                "--max_new_tokens is the length of a reply: give --check_answers as well.",
            ),
            (
                len(set(self.model)) < len(self.model),
                f"--model {' '.join(self.model)}: one of them is there twice.",
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
            "Here each process holds a whole model: launch with ddp.yaml or multi_cpu.yaml, which cut none."
        )
    configs = {name: open_config(name, trust_remote_code=args.trust_remote_code) for name in args.model}
    is_classifier = check_kinds(configs, args)
    task_manager = find_tasks(args.tasks, include_path=args.include_path) if args.tasks else None

    # 1. The data: the same for every model
    data = load_data(args, accelerator, is_classifier=is_classifier)
    if isinstance(data, LabelledTexts):
        for name, config in configs.items():
            check_labels(name, config, data)

    results: dict[str, dict[str, Any]] = {}
    for name in args.model:
        # 2. The model, with its own tokenizer
        tokenizer = load_classifier_tokenizer(name) if is_classifier else open_tokenizer(name, args)
        model = load_model(name, configs[name], args, is_classifier=is_classifier).to(accelerator.device).eval()
        results[name] = {}

        # 3. Every text, response or token once
        if isinstance(data, LabelledTexts):
            results[name] |= score_labelled_texts(model, tokenizer, data, args, accelerator)
        elif isinstance(data, list):
            results[name] |= score_conversations(model, tokenizer, data, args, accelerator)
        elif data is not None:
            results[name] |= score_documents(model, tokenizer, data, args, accelerator)

        # 4. lm-eval's tasks, on the first process
        if task_manager is not None and accelerator.is_main_process:
            options = {"names": args.tasks, "batch_size": args.per_device_eval_batch_size, "limit": args.limit}
            results[name] |= run_tasks(model, tokenizer, task_manager, **options)
        accelerator.wait_for_everyone()

        # 5. Beside what training wrote
        if accelerator.is_main_process:
            keep_numbers(name, results[name], args)
    if accelerator.is_main_process:
        print(f"\n{metrics_table(results)}")


def check_kinds(configs: dict[str, PretrainedConfig], args: EvaluateArguments) -> bool:
    """Whether the models are classifiers; an adapter's labels go into its base's config. Mixtures are refused."""
    kinds = {}
    for name, config in configs.items():
        architecture = next(iter(config.architectures or []), "causal model")
        kinds[name] = "classifier" if architecture.endswith("ForSequenceClassification") else "causal"
        if "Classification" in architecture and kinds[name] != "classifier":
            raise ValueError(
                f"--model {name} is a {architecture}; measured are causal models and classifiers of texts."
            )
        if args.adapter is not None and adapter_config(args.adapter).task_type == "SEQ_CLS":
            if kinds[name] == "causal":
                config.id2label = adapter_labels(args.adapter)
                config.label2id = {label: index for index, label in config.id2label.items()}
            kinds[name] = "classifier"
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name} is a {kind} model" for name, kind in kinds.items())
        raise ValueError(f"Models of one kind stand side by side, and these are of two: {listing}. Measure each apart.")
    is_classifier = "classifier" in kinds.values()
    if not is_classifier:
        if args.label_column != "label":
            raise ValueError(
                f"--label_column {args.label_column} is for classifiers; {args.model[0]} is a causal model."
            )
        return False
    wrong = [
        (bool(args.tasks), "--tasks"),
        (args.conversations, "--conversations"),
        (args.stride is not None, "--stride"),
        (args.validation_fraction != 0, "--validation_fraction"),
    ]
    if given := [option for is_given, option in wrong if is_given]:
        raise ValueError(f"{', '.join(given)}: for causal models. {args.model[0]} labels texts and predicts no tokens.")
    if args.dataset == "stdlib":
        raise ValueError(
            "--dataset stdlib: a classifier is trained on most of its docstrings. Give labelled texts held back from "
            "training; the numbers of its test part are in finetune_classification.py's metrics.json."
        )
    for name, config in configs.items():
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"--model {name} has {config.num_labels} outputs for {config.problem_type or 'regression'}; measured "
                "are classifiers that choose one of several labels."
            )
    return True


def adapter_config(adapter: str) -> Any:
    """PEFT's config of the adapter."""
    from peft import PeftConfig  # takes seconds to import

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        raise ValueError(f"--adapter {adapter} is a folder without an adapter_config.json, so no PEFT adapter.")
    try:
        return PeftConfig.from_pretrained(str(folder) if folder.is_dir() else adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"--adapter {adapter!r} is no PEFT adapter: {str(error).splitlines()[0]}") from error


def adapter_labels(adapter: str) -> dict[int, str]:
    """A classifier's labels, as its adapter says them, or the config.json beside it or one folder above."""
    folder = Path(adapter).expanduser()
    for path in (folder / "base_model.json", folder / "config.json", folder.absolute().parent / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "id2label" in config:
            return {int(index): label for index, label in config["id2label"].items()}
    raise ValueError(
        f"--adapter {adapter} is a classifier's, but nothing says its labels: there is no config.json with id2label in "
        "its folder or the one above. Put the run's config.json there, or give the merged model as --model."
    )


def check_labels(name: str, config: PretrainedConfig, data: LabelledTexts) -> None:
    if unknown := sorted(set(data.labels) - set(config.label2id)):
        raise ValueError(
            f"The texts have the labels {unknown[:5]}, which --model {name} does not know; it knows "
            f"{list(config.label2id)[:20]}. Is --label_column right? Or rename the labels."
        )


def open_tokenizer(name: str, args: EvaluateArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the adapter's, which may have a chat template that the base lacks."""
    if args.adapter is None:
        return load_tokenizer(name)
    from hfllm.adapters import tokenizer_source  # imports PEFT

    return load_tokenizer(tokenizer_source(name, str(Path(args.adapter).expanduser())))


def load_model(name: str, config: PretrainedConfig, args: EvaluateArguments, *, is_classifier: bool) -> torch.nn.Module:
    """The model in `--dtype`, with its adapter if there is one, which is refused on another base than its own."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "trust_remote_code": args.trust_remote_code}
    if is_classifier:
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config, **options)
    else:
        model = open_causal_lm(name, **options)
    if args.adapter is None:
        return model
    from hfllm.adapters import load_adapter  # imports PEFT

    folder = Path(args.adapter).expanduser()
    return load_adapter(model, folder if folder.is_dir() else args.adapter)


def load_data(
    args: EvaluateArguments, accelerator: Accelerator, *, is_classifier: bool
) -> datasets.Dataset | list[Conversation] | LabelledTexts | None:
    """Documents (parts in the columns `text` and `document`), conversations, or labelled texts."""
    if args.dataset is None:
        return None
    is_local = args.dataset == "stdlib" or Path(args.dataset.split(",")[0].strip()).expanduser().exists()
    if is_local and args.split != "test":
        raise ValueError(
            f"--split {args.split}: only datasets on the Hub have splits; {args.dataset} is local and read whole. "
            "Name the files to score."
        )
    options: dict[str, Any] = {"dataset_config": args.dataset_config, "split": "train" if is_local else args.split}
    with accelerator.main_process_first():
        if is_classifier:
            columns = {"text_column": args.text_column, "label_column": args.label_column}
            return load_labelled_texts(args.dataset, **options, **columns)
        if args.conversations:
            pairs = [each.partition("=") for each in args.column_map or []]
            if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
                raise ValueError(f"--column_map {wrong[0]}: give name=meaning, e.g. question=prompt answer=response")
            column_map = {name: meaning for name, _, meaning in pairs}
            return load_conversations(args.dataset, column_map=column_map, **options).rows
        corpus = load_corpus(args.dataset, text_column=args.text_column, cache_dir=args.cache_dir, **options)
    if args.validation_fraction == 0:
        return corpus.documents
    return split_documents(corpus, validation_fraction=args.validation_fraction)[1]


def choose_block_size(model: torch.nn.Module, args: EvaluateArguments, *, at_most: int) -> int:
    context = getattr(model.config, "max_position_embeddings", None)
    block_size = args.block_size or min(context or 1024, at_most)
    if context is not None and block_size > context:
        raise ValueError(f"--block_size {block_size} is more than the model's context of {context}.")
    return block_size


def score_labelled_texts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: LabelledTexts,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What finetune_classification.py writes of its test texts."""
    # As many tokens of a text as were read in training, which the saved tokenizer knows
    block_size = choose_block_size(model, args, at_most=tokenizer.model_max_length)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    model.config.pad_token_id = tokenizer.pad_token_id  # by which transformers' own classes find a text's end
    texts = [row[:block_size] for row in tokenizer(data.texts, truncation=False, verbose=False)["input_ids"]]
    logits = predict_logits(
        model,
        texts,
        num_labels=len(names),
        batch_size=args.per_device_eval_batch_size,
        pad_token_id=tokenizer.pad_token_id,
        accelerator=accelerator,
    )
    scores = score_predictions(logits, np.array([model.config.label2id[label] for label in data.labels]), names)
    about = {"texts": len(texts), "dataset": args.dataset, "block_size": block_size}
    return {f"test_{name}": value for name, value in (scores | about).items()}


def score_conversations(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Nats per token of the responses, and with `--check_answers` how many greedy replies are the response."""
    block_size = choose_block_size(model, args, at_most=1024)
    encoded = encode_conversations(conversations, tokenizer, max_length=block_size)
    rows = ConversationRows(encoded, block_size=block_size, pad_token_id=padding_token_id(tokenizer), packing=False)
    order = np.argsort([-length for length in rows.lengths], kind="stable")  # rows of a batch are of like length
    loss, num_tokens = score_rows(
        model, rows, order, batch_size=args.per_device_eval_batch_size, accelerator=accelerator
    )
    numbers = {
        "test_loss": loss,
        "test_response_tokens": num_tokens,
        "test_conversations": len(encoded.rows),
        "test_truncated": encoded.account["truncated"],
        "test_dropped": encoded.account["dropped"],
        "test_dataset": args.dataset,
        "test_block_size": block_size,
    }
    if not args.check_answers:
        return numbers
    stop_at_turns(model, tokenizer, stop_token_id=encoded.stop_token_id)
    questions = [conversations[row.index] for row in encoded.rows]
    own = range(accelerator.process_index, len(questions), accelerator.num_processes)
    replies = answer(
        model,
        tokenizer,
        [questions[index] for index in own],
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    by_index = dict(gather_object(list(zip(own, replies))))
    return numbers | exact_match(questions, [by_index[index] for index in range(len(questions))])


def score_documents(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: datasets.Dataset,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> dict[str, Any]:
    block_size = choose_block_size(model, args, at_most=1024)
    stride = args.stride or block_size
    if stride > block_size:
        raise ValueError(f"--stride {stride} is larger than the block_size {block_size}: tokens would be left out.")
    encode = document_encoder(tokenizer)
    numbers, texts = np.array(documents["document"]), documents["text"]
    parts = encode(list(texts))
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # where documents begin among the parts
    ends = [*starts[1:], len(parts)]
    encoded = [np.concatenate(parts[start:end]) for start, end in zip(starts, ends, strict=True)]
    largest = max(int(ids.max()) for ids in encoded if len(ids))
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {largest}, but the model has {model.config.vocab_size} embeddings."
        )
    windows = list(cut_windows(encoded, prefix_token_id=tokenizer.bos_token_id, block_size=block_size, stride=stride))
    num_bytes = sum(len(text.encode()) for text in texts)
    evaluation = evaluate_windows(
        model, windows, num_bytes=num_bytes, batch_size=args.per_device_eval_batch_size, accelerator=accelerator
    )
    return {
        "test_loss": evaluation.loss,
        "test_perplexity": evaluation.perplexity,
        "test_bits_per_byte": evaluation.bits_per_byte,
        "test_tokens": evaluation.num_tokens,
        "test_bytes": evaluation.num_bytes,
        "test_documents": len(encoded),
        "test_dataset": args.dataset,
        "test_block_size": block_size,
        "test_stride": stride,
    }


def keep_numbers(name: str, numbers: dict[str, Any], args: EvaluateArguments) -> None:
    """Into the metrics.json of --output_dir, of the adapter or of the model; into a run's card and page as well."""
    if args.output_dir is not None:
        folder = Path(args.output_dir) / (Path(name).name if len(args.model) > 1 else "")
    elif args.adapter is not None and Path(args.adapter).is_dir():
        folder = Path(args.adapter)
    elif args.adapter is None and Path(name).is_dir():
        folder = Path(name)
    else:
        print(f"{name} is no folder here, so its numbers are only printed. Give --output_dir to keep them.")
        return
    print(add_metrics(folder, numbers))
    if (folder / "arguments.yaml").exists():  # a run's folder
        write_page_and_card(folder)


if __name__ == "__main__":
    run(main, EvaluateArguments, description=__doc__)
