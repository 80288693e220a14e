"""Chapter 2, first half: train a tokenizer, a byte-level BPE, on your own text.

On a laptop, offline, on the source of Python's standard library (ten seconds on two cores):

    python recipes/train_tokenizer.py --config recipes/configs/tokenizer_demo.yaml --output_dir out/tokenizer

On your own text (a .txt, .jsonl, .json, .csv or .parquet file, or a folder of them), beside GPT-2's tokenizer:

    python recipes/train_tokenizer.py --dataset my.txt --vocab_size 8192 --output_dir out/tokenizer \\
        --compare_with openai-community/gpt2

On a dataset of the Hub:

    python recipes/train_tokenizer.py --dataset roneneldan/TinyStories --vocab_size 8192 --output_dir out/tokenizer

The recipe uses all cores of one machine and no accelerator; start it without `accelerate launch`. `--help` explains
every option.
"""

import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator

from hfllm.cli import options as groups
from hfllm.cli.arguments import run, save_arguments
from hfllm.cli.options import Location, arguments, check_numbers, differs, inputs_of, option, values_of
from hfllm.data.corpus import count_documents, describe_held_out, load_corpus, split_documents
from hfllm.runs.completion import describe_finish
from hfllm.runs.files import write_json
from hfllm.runs.folder import RunFolder, claim_folder
from hfllm.tokenization import (
    CHAT_TEMPLATE,
    RESERVED_TOKENS,
    SPLIT_PATTERN,
    check_vocab_size,
    format_tokenizer_report,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_report,
    train_bpe,
)

import datasets


@arguments
class TokenizerArguments(
    groups.TrainingDataset,
    groups.TextColumn,
    groups.DocumentSeparator,
    groups.VocabSize,
    groups.Cache,
    groups.Overwrite,
    groups.Config,
):
    validation_fraction = differs(help="Share of the bytes held out, by whole documents. Give pretrain.py the same.")
    vocab_size = differs(help="Number of token ids, with the reserved tokens and the 256 bytes.")
    max_bytes: int = option(2**30, section="text", help="Most bytes of text to train on.", at_least=1)
    compare_with: list[str] | None = option(
        None,
        section="text",
        help="Folders or Hub ids of other tokenizers to measure on the held-out text.",
        location=Location.READ_OR_NAMED,
    )
    output_dir = differs("out/tokenizer", help="Folder of the tokenizer.")
    overwrite_output_dir = differs(help="Replace another tokenizer in output_dir.")


REPORT_FILE = "tokenizer_report.json"
PRETRAIN_DEMO = {"dataset": "stdlib", "validation_fraction": 0.02}  # as pretrain_demo.yaml says already
MEASURED_BYTES = 20_000_000  # of held-out text: enough for three digits, and fast


def main(args: TokenizerArguments) -> None:
    check_vocab_size(args.vocab_size)
    check_numbers(args)
    logging.basicConfig(format="%(message)s")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A tokenizer is trained by one process: start this recipe with python, not accelerate launch.")
    claim = claim_folder(
        args.output_dir,
        recipe="train_tokenizer",
        overwrite=args.overwrite_output_dir,
        inputs=inputs_of(args),
        cache_dir=args.cache_dir,
    )
    with claim as folder:
        others = {name: load_tokenizer(name, require_eos=False) for name in args.compare_with or []}

        # 1. Text to documents. The tokenizer never sees the documents that pretrain.py holds out.
        corpus = load_corpus(
            args.dataset,
            dataset_config=args.dataset_config,
            split=args.split,
            text_column=args.text_column,
            on_bad_record=args.on_bad_record,
            delimiter=args.delimiter,
            document_separator=args.document_separator,
            exclude=[path for path in (args.output_dir, args.cache_dir) if path is not None],
            cache_dir=args.cache_dir,
        )
        training, held_out = split_documents(corpus, validation_fraction=args.validation_fraction)
        print(
            f"{args.dataset}: {count_documents(corpus.account['documents'])}, {corpus.account['bytes']:,} bytes, "
            f"sha256 {corpus.fingerprint[:16]}\nHeld out: {describe_held_out(corpus, held_out)}",
            flush=True,
        )

        # 2. The tokenizer: the one in the folder, if it was made from the same text in the same way, or a new one
        made_from = {
            "corpus_sha256": corpus.fingerprint,
            "validation_fraction": args.validation_fraction,
            "vocab_size": args.vocab_size,
            "max_bytes": args.max_bytes,
            "rules_sha256": hashlib.sha256((SPLIT_PATTERN + CHAT_TEMPLATE).encode()).hexdigest(),
        }
        if folder.is_of_earlier_version and not args.overwrite_output_dir:
            adopt_earlier_version(folder)
        folder.check_same(made_from)
        fault = folder.find_fault()
        if "has changed" in fault:
            raise ValueError(f"{args.output_dir}/{fault}. Choose another output_dir, or set overwrite_output_dir.")
        is_new = fault != ""
        if is_new:
            print("Training ...", flush=True)
            started = time.perf_counter()
            tokenizer = train_bpe(
                texts_of(training), args.vocab_size, max_bytes=args.max_bytes, show_progress=sys.stderr.isatty()
            )
            print(f"Trained {len(tokenizer):,} ids in {time.perf_counter() - started:.1f} s.", flush=True)
        else:
            tokenizer = load_tokenizer(args.output_dir)
            print(f"{args.output_dir} holds this tokenizer already.", flush=True)

        # 3. Compression of held-out text
        measured_on = "held-out documents" if len(held_out) else "training documents"
        texts = first_bytes(texts_of(held_out if len(held_out) else training), MEASURED_BYTES)
        report = {
            "made_from": made_from,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "corpus": corpus.account,
            "measured_on": measured_on,
            **tokenizer_report(tokenizer, texts, others=others),
        }
        print(f"\nOn {measured_on}:\n{format_tokenizer_report(report)}\n")

        # 4. The tokenizer in the form that other tools open, with the numbers beside it
        with folder.writing() as partial:
            if is_new:
                tokenizer.save_pretrained(partial)
                save_arguments(args, partial / "arguments.yaml")
            write_json(partial / REPORT_FILE, report)
            folder.begin(made_from)
        if is_new:
            folder.finish(files=folder.moved)
    print(
        f"""{args.output_dir}/tokenizer.json         the tokenizer; ids 0 to {len(RESERVED_TOKENS) - 1} are reserved: \
{" ".join(RESERVED_TOKENS)}
{args.output_dir}/{REPORT_FILE}  the numbers above

Next, pretrain a model on it:
    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py \\
        {pretrain_options(args)} --tokenizer {shlex.quote(args.output_dir)} \
--output_dir {"out/demo" if args.dataset == "stdlib" else "out/mine"}"""
    )


def texts_of(documents: datasets.Dataset) -> Iterator[str]:
    """The documents' texts; long documents come in parts, as they are stored, cut between two words."""
    for batch in documents.iter(batch_size=256):
        yield from batch["text"]


def first_bytes(texts: Iterator[str], max_bytes: int) -> Iterator[str]:
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode("utf-8"))
        if num_bytes >= max_bytes:
            return


def adopt_earlier_version(folder: RunFolder) -> None:
    """Accept the tokenizer of an earlier version without a record, if its report says what it was made from."""
    try:
        report = json.loads((folder.path / REPORT_FILE).read_text(encoding="utf-8"))
        made_from, fingerprint = report["made_from"], report["fingerprint"]
        is_unchanged = fingerprint == tokenizer_fingerprint(load_tokenizer(folder.path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder.path} holds a tokenizer without a {REPORT_FILE} that says how it was made ({error}). Choose "
            "another output_dir, or set overwrite_output_dir."
        ) from error
    finished = describe_finish(folder.path, step=None, files=["tokenizer.json"])
    if not is_unchanged:
        finished["sha256"]["tokenizer.json"] = "another"
    folder.record |= {"identity": made_from, "is_old": False, "finished": finished}


def pretrain_options(args: TokenizerArguments) -> str:
    """Options for pretrain.py: the demo's configuration, or five minutes on another text; and changed options."""
    known, size = vars(TokenizerArguments()), "--max_train_minutes 5"
    if args.dataset == "stdlib":
        known, size = known | PRETRAIN_DEMO, "--config recipes/configs/pretrain_demo.yaml"
    text = values_of(args, groups.TrainingDataset, groups.TextColumn, groups.DocumentSeparator)
    given = {name: value for name, value in text.items() if value != known[name]}
    return " ".join([size, *(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())])


if __name__ == "__main__":
    run(main, TokenizerArguments, description=__doc__)
