"""Chapter 2, first half: train a tokenizer, a byte-level BPE, on your own text.

On a laptop, offline, on the source of Python's standard library (ten seconds on two cores):

    python recipes/train_tokenizer.py --config recipes/configs/tokenizer_demo.yaml --output_dir out/tokenizer

On your own text (a .txt, .jsonl, .json, .csv or .parquet file, or a folder of them), beside GPT-2's tokenizer:

    python recipes/train_tokenizer.py --dataset my.txt --vocab_size 8192 --output_dir out/tokenizer \\
        --compare_with openai-community/gpt2

On a dataset of the Hub:

    python recipes/train_tokenizer.py --dataset roneneldan/TinyStories --vocab_size 8192 --output_dir out/tokenizer

A tokenizer uses all cores of one machine and no accelerator, so `accelerate launch` has no part in it.
`--help` explains every option.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfllm.cli import options as groups
from hfllm.cli.arguments import run, save_arguments
from hfllm.cli.options import Location, arguments, check_numbers, differs, option, values_of
from hfllm.data.corpus import count_documents, describe_held_out, load_corpus, split_documents
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
from transformers import PreTrainedTokenizerBase


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
# What a tokenizer's folder may hold; a folder with anything else in it is never replaced.
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "arguments.yaml", REPORT_FILE),
}
PRETRAIN_DEMO = {"dataset": "stdlib", "validation_fraction": 0.02}  # as pretrain_demo.yaml says already
MEASURED_BYTES = 20_000_000  # of held-out text: enough for three digits, and seconds rather than minutes


def main(args: TokenizerArguments) -> None:
    check_vocab_size(args.vocab_size)
    check_numbers(args)
    logging.basicConfig(format="%(message)s")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A tokenizer is trained by one process: start this recipe with python, not accelerate launch.")
    output_dir = Path(args.output_dir).expanduser().resolve()
    check_output_dir(output_dir)
    others = {name: load_tokenizer(name, require_eos=False) for name in args.compare_with or []}

    # 1. Text to documents. The same documents are held back as in pretrain.py, so the tokenizer has not seen them.
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
    tokenizer = find_tokenizer(output_dir, made_from, overwrite=args.overwrite_output_dir)
    is_new = tokenizer is None
    if tokenizer is None:
        print("Training ...", flush=True)
        started = time.perf_counter()
        tokenizer = train_bpe(
            texts_of(training), args.vocab_size, max_bytes=args.max_bytes, show_progress=sys.stderr.isatty()
        )
        print(f"Trained {len(tokenizer):,} ids in {time.perf_counter() - started:.1f} s.", flush=True)
    else:
        print(f"{args.output_dir} holds this tokenizer already.", flush=True)

    # 3. How well it compresses text it has not seen
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
    if is_new:
        write_tokenizer(output_dir, tokenizer, report, args)
    else:
        write_report(output_dir, report)
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
    """The documents' texts; long documents are stored, and given here, in parts that are cut between two words."""
    for batch in documents.iter(batch_size=256):
        yield from batch["text"]


def first_bytes(texts: Iterator[str], max_bytes: int) -> Iterator[str]:
    num_bytes = 0
    for text in texts:
        yield text
        num_bytes += len(text.encode("utf-8"))
        if num_bytes >= max_bytes:
            return


def check_output_dir(output_dir: Path) -> None:
    """Fail now rather than after the work, if the folder cannot be written or holds anything but a tokenizer."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; name a folder, e.g. out/tokenizer.")
    if output_dir.is_dir() and (foreign := sorted({child.name for child in output_dir.iterdir()} - TOKENIZER_FILES)):
        raise ValueError(
            f"--output_dir {output_dir} holds other files than a tokenizer's ({', '.join(foreign[:5])}). "
            "A tokenizer needs its own folder: name a new one, e.g. out/tokenizer."
        )
    partial = partial_folder(output_dir)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {error}. Name another folder.") from error
    partial.rmdir()


def partial_folder(output_dir: Path) -> Path:
    return output_dir.with_name(output_dir.name + ".partial")


def find_tokenizer(output_dir: Path, made_from: dict[str, Any], *, overwrite: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder, if it is the requested one; None if there is none, or it is to be overwritten."""
    if overwrite or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return None
    try:
        report = json.loads((output_dir / REPORT_FILE).read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(output_dir)
        if report["fingerprint"] != tokenizer_fingerprint(tokenizer):
            difference = "its tokenizer.json is not the one that its report describes"
        elif changed := [name for name, value in made_from.items() if report["made_from"].get(name) != value]:
            difference = ", ".join(f"{name} {report['made_from'].get(name)} -> {made_from[name]}" for name in changed)
        else:
            return tokenizer
    except (OSError, ValueError, KeyError) as error:
        difference = f"it has no {REPORT_FILE} that says how it was made ({error})"
    raise ValueError(
        f"--output_dir {output_dir} holds another tokenizer: {difference}. "
        "Name another folder, or replace it with --overwrite_output_dir."
    )


def write_tokenizer(
    output_dir: Path, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any], args: TokenizerArguments
) -> None:
    """Write into another folder, then rename it: an interrupted run leaves no incomplete tokenizer."""
    partial = partial_folder(output_dir)
    partial.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(partial)
    save_arguments(args, partial / "arguments.yaml")
    write_report(partial, report)
    if output_dir.exists():
        replaced = output_dir.with_name(output_dir.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        output_dir.rename(replaced)
        partial.rename(output_dir)
        shutil.rmtree(replaced)
    else:
        partial.rename(output_dir)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    beside = folder.with_name(f"{folder.name}.{REPORT_FILE}")
    beside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(folder / REPORT_FILE)


def pretrain_options(args: TokenizerArguments) -> str:
    """Options for pretrain.py: the demo's configuration or, for another text, five minutes; and what differs."""
    known, size = vars(TokenizerArguments()), "--max_train_minutes 5"
    if args.dataset == "stdlib":
        known, size = known | PRETRAIN_DEMO, "--config recipes/configs/pretrain_demo.yaml"
    text = values_of(args, groups.TrainingDataset, groups.TextColumn, groups.DocumentSeparator)
    given = {name: value for name, value in text.items() if value != known[name]}
    return " ".join([size, *(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())])


if __name__ == "__main__":
    run(main, TokenizerArguments, description=__doc__)
