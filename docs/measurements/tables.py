"""Put the numbers of docs/measurements/*.json into the tables of README.md and docs/numbers.md.

    python docs/measurements/tables.py

A group of numbers without a raw file keeps the text that the documents have, which says so. A test compares what this
script would write with what the documents hold.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
GPT2, GPT2_FAST, LLAMA = "transformers GPT-2", "transformers GPT-2, no dropout", "transformers Llama"
MODERN, BOOK = "hfllm, modern", "hfllm, book"
NO_FILE = "raw file not kept"  # what a table says whose numbers have none


def main() -> None:
    for path, text in render_documents().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: up to date")


def render_documents() -> dict[Path, str]:
    """README.md and docs/numbers.md with the numbers of every raw file that is there."""
    readme, numbers = ROOT / "README.md", ROOT / "docs" / "numbers.md"
    texts = {path: path.read_text(encoding="utf-8") for path in (readme, numbers)}
    for name in BLOCKS:
        if (file := FOLDER / f"{name}.json").exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            texts[numbers] = replace_block(texts[numbers], name, f"{source(name, content)}\n\n{render(name, content)}")
            texts[readme] = replace_row(texts[readme], name, content["results"])
            if name == "demo":
                texts[readme] = replace_block(texts[readme], "demo", printed_by_demo(content["results"]))
    return texts


def render(name: str, content: dict[str, Any]) -> str:
    return BLOCKS[name](content["results"])


def source(name: str, content: dict[str, Any]) -> str:
    measured = content["measured"]
    environment = measured["environment"]
    return (
        f"`{measured['command']}` on {measured['date']}, {environment['cores']} cores of {environment['processor']}: "
        f"[{name}.json](measurements/{name}.json)."
    )


def replace_block(text: str, name: str, content: str) -> str:
    """The text between `<!-- NAME -->` and `<!-- /NAME -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"There is no block {name!r} in the document."
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def replace_row(text: str, name: str, results: dict[str, Any]) -> str:
    """The README's row of that label, if it has one."""
    if name not in ROWS:
        return text
    label, cells = ROWS[name]
    row = " | ".join([label, *cells(results), f"[{name}.json](docs/measurements/{name}.json)"])
    lines = text.split("\n")
    [place] = [number for number, line in enumerate(lines) if line.startswith(f"| {label} |")]
    lines[place] = f"| {row} |"
    return "\n".join(lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def spread(numbers: dict[str, float], digits: int = 2) -> str:
    return f"{100 * numbers['mean']:.{digits}f} ± {100 * numbers['standard_deviation']:.{digits}f} %"


# The README's five rows: hfllm's numbers, and those beside them.


def row_of_time_to_quality(results: dict[str, Any]) -> list[str]:
    other = results["other"]
    return [
        f"{other['total_seconds']:.1f} s to {other['eval_bits_per_byte']['ours']:.3f} "
        "(a text that no setting was chosen on)",
        f"nanoGPT's CPU configuration: {other['seconds']['baseline']:.1f} s to "
        f"{other['eval_bits_per_byte']['baseline']:.3f}",
    ]


def row_of_training_step(results: dict[str, Any]) -> list[str]:
    def speeds(model: str) -> str:
        both = (results[dtype]["training"][model][f"speed_against_{GPT2}"] for dtype in ("float32", "bfloat16"))
        return " / ".join(f"{speed:.2f}" for speed in both)

    return [speeds(MODERN), f"Llama {speeds(LLAMA)}; GPT-2 without dropout {speeds(GPT2_FAST)}"]


def row_of_decoding(results: dict[str, Any]) -> list[str]:
    models = results["one_thread"]["decoding"]
    modern, llama, gpt2 = (f"{models[name]['tokens_per_second']:.0f}" for name in (MODERN, LLAMA, GPT2_FAST))
    return [f"{modern} tokens/s", f"Llama {llama} tokens/s; GPT-2 {gpt2} tokens/s"]


def row_of_demo(results: dict[str, Any]) -> list[str]:
    demo, classifier, chat = results["demo"], results["classifier"], results["chat"]
    other = f"; on another one {results['other']['eval_bits_per_byte']:.3f}" if "other" in results else ""
    return [
        f"{demo['eval_bits_per_byte']:.3f} bits per byte (shape chosen on this text{other}); "
        f"{percent(classifier['test_accuracy'])}; {percent(chat['test_exact_match'])}",
        f"logistic regression on TF-IDF: {percent(classifier['test_logistic_regression_accuracy'])} (classifier)",
    ]


def row_of_sms(results: dict[str, Any]) -> list[str]:
    ours = results["as_configured"]
    return [
        f"{spread(ours['model'])} ({ours['num_trained_parameters'] / 1e6:.1f} million parameters)",
        f"logistic regression on TF-IDF {spread(ours['tf_idf'])}; the book's GPT-2 at its best "
        f"{percent(results['book']['best_accuracy'], 2)} (124 million, one split)",
    ]


ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "time_to_quality": (
        "From a text to a model, everything included: seconds, bits per held-out byte",
        row_of_time_to_quality,
    ),
    "training_step": ("A training step, speed, GPT-2 = 1; float32 / bfloat16", row_of_training_step),
    "decoding": ("Greedy decoding, float32, one thread", row_of_decoding),
    "demo": ("`make demo`: the model; a classifier's accuracy; a chat's exact match", row_of_demo),
    "sms": ("SMS spam, test accuracy, five splits", row_of_sms),
}


SHOWN = re.compile(
    r"Trained .* ids|Model: |Validation: .* per byte| +accuracy |this model  |logistic regression, |Exact "
)
SAMPLE_LINES = 6


def printed_by_demo(results: dict[str, Any]) -> str:
    """Some of what `make demo` printed, and the chat's replies, as a block of code."""
    printed = results["printed"]
    lines = ["```", "$ make demo"]
    for number, line in enumerate(printed):
        if line.startswith("--- sample 1,"):  # the first sample of generate.py
            sample = itertools.takewhile(lambda each: not each.startswith("---"), printed[number + 1 :])
            lines += ["...", *itertools.islice(sample, SAMPLE_LINES), "..."]
        elif SHOWN.match(line):
            lines.append(line if len(line) <= 118 else f"{line[:115]}...")
    lines += ["", "$ python recipes/chat.py --model out/chat"]
    for question, reply in results["replies"].items():
        lines += [f"> {question}", *reply.splitlines()]
    return "\n".join([*lines, "```"])


# The tables of docs/numbers.md.


def other_text(other: dict[str, Any]) -> list[str]:
    what = f"the same tokenizer and pretraining on a text that nothing was chosen on, {other['bytes']:,} bytes"
    return [what, f"{other['seconds'] / 60:.1f} min", f"{other['eval_bits_per_byte']:.3f} bits per byte"]


def demo_table(results: dict[str, Any]) -> str:
    seconds, tokenizer, demo = results["seconds"], results["tokenizer"], results["demo"]
    classifier, chat = results["classifier"], results["chat"]
    kinds = {
        key.removeprefix("test_exact_match_").replace("_", " "): value
        for key, value in chat.items()
        if key.startswith("test_exact_match_")
    }
    rows = [
        [
            "tokenizer",
            f"{seconds['train_tokenizer']:.0f} s",
            f"{tokenizer['bytes_per_token']:.2f} bytes per token of held-out text, {tokenizer['vocab_size']:,} ids",
        ],
        [
            f"pretraining: {demo['num_parameters']:,} parameters, {demo['train_tokens'] / 1e6:.2f} million tokens",
            f"{seconds['pretrain'] / 60:.1f} min, {demo['tokens_per_second']:,.0f} tokens/s, "
            f"{demo['peak_memory_bytes'] / 2**30:.1f} GiB",
            f"{demo['eval_bits_per_byte']:.3f} bits per byte ({results['halfway_bits_per_byte']:.3f} halfway)",
        ],
        [
            "classifier: which of ten packages is a docstring from?",
            f"{seconds['finetune_classification']:.0f} s",
            f"{percent(classifier['test_accuracy'])} of {classifier['test_texts']} test texts (macro F1 "
            f"{classifier['test_f1_macro']:.3f}); logistic regression on TF-IDF "
            f"{percent(classifier['test_logistic_regression_accuracy'])} "
            f"({classifier['test_logistic_regression_f1_macro']:.3f})",
        ],
        [
            f"chat: {chat['test_questions']:,} questions about Python that were not in training, exact match",
            f"{seconds['finetune_instruction'] / 60:.1f} min, {chat['tokens_per_second']:,.0f} tokens/s",
            f"{percent(chat['test_exact_match'])}; by kind: "
            + ", ".join(f"{kind} {percent(value)}" for kind, value in kinds.items()),
        ],
        *([other_text(results["other"])] if "other" in results else []),
        ["everything after the installation", f"{seconds['all'] / 60:.1f} min", ""],
    ]
    return table(["", "time", "result"], rows)


def time_to_quality_table(results: dict[str, Any]) -> str:
    rows = []
    names = {"other": "a text that no setting was chosen on", "chosen_on": "the text that settings were chosen on"}
    for name, what in names.items():
        if name not in results:
            continue
        numbers = results[name]
        seconds, bits = numbers["seconds"], numbers["eval_bits_per_byte"]
        size = f"{what}, {numbers['bytes']:,} bytes"
        rows.append(
            [
                f"{size}: hfllm",
                f"{numbers['total_seconds']:.1f} (tokenizer {seconds['tokenizer']:.1f})",
                f"{bits['ours']:.3f}",
            ]
        )
        rows.append(["... nanoGPT's CPU configuration", f"{seconds['baseline']:.1f}", f"{bits['baseline']:.3f}"])
    return table(["", "seconds", "validation bits per byte"], rows)


def training_step_table(results: dict[str, Any]) -> str:
    rows = []
    for name in (MODERN, BOOK, LLAMA, GPT2_FAST, GPT2):
        cells = []
        for dtype in ("float32", "bfloat16"):
            numbers = results[dtype]["training"][name]
            speed = numbers[f"speed_against_{GPT2}"]
            cells.append(f"{speed:.2f} ({numbers['tokens_per_second']:,.0f} tokens/s, {percent(numbers['mfu'], 0)})")
        cells.append(f"{results['memory']['memory'][name]['bytes'] / 2**20:,.0f} MiB")
        rows.append([name, *cells])
    return table(["", "float32", "bfloat16", "memory, float32"], rows)


def decoding_table(results: dict[str, Any]) -> str:
    rows = []
    for name in results["one_thread"]["decoding"]:
        cells = []
        for threads in ("one_thread", "all_threads"):
            numbers = results[threads]["decoding"][name]
            ratios = " / ".join(f"{numbers[f'speed_against_{other}']:.2f}" for other in (GPT2_FAST, LLAMA))
            cells.append(f"{numbers['tokens_per_second']:,.0f} tokens/s ({ratios})")
        rows.append([name, *cells])
    return table(["tokens/s (speed beside GPT-2 / Llama)", "one thread", "all threads"], rows)


def scaling_table(results: dict[str, Any]) -> str:
    points = results["scaling"]  # of each shape one for each model, side by side
    models = list(dict.fromkeys(point["model"] for point in points))
    rows = []
    for start in range(0, len(points), len(models)):
        each = {point["model"]: point for point in points[start : start + len(models)]}
        cells = [
            " / ".join(f"{1e3 * each[name][f'{kind}_seconds_per_token']:.2f}" for kind in ("training", "decoding"))
            for name in models
        ]
        first = each[models[0]]
        rows.append([f"{first['num_parameters'] / 1e6:.1f} million, {first['context']:,}", *cells])
    return table(["parameters, context", *models], rows)


def accuracy_rows(results: dict[str, Any], names: dict[str, str]) -> list[list[str]]:
    def each(numbers: dict[str, Any]) -> str:
        return f"{spread(numbers)} ({', '.join(f'{100 * value:.2f}' for value in numbers['accuracy'])})"

    rows = [
        [label, f"{results[name]['num_trained_parameters']:,}", each(results[name]["model"])]
        for name, label in names.items()
    ]
    return [*rows, ["logistic regression on TF-IDF, same splits", "", each(results["as_configured"]["tf_idf"])]]


def sms_table(results: dict[str, Any]) -> str:
    names = {
        "as_configured": "all weights, as the file has it",
        "without_smoothing": "... without label smoothing",
        "lora_without_smoothing": "`--method lora`, without label smoothing",
    }
    book = results["book"]
    accuracies = "; ".join(percent(book[name], 2) for name in ("random_weights_accuracy", "best_accuracy"))
    last = ["the book's GPT-2, one split: random weights; at its best", f"{book['gpt2_parameters']:,}", accuracies]
    return table(["", "trained parameters", "test accuracy"], [*accuracy_rows(results, names), last])


def docstrings_table(results: dict[str, Any]) -> str:
    rows = accuracy_rows(results, {"as_configured": "the demo's classifier"})
    return table(["", "trained parameters", "test accuracy"], rows)


def book_table(results: dict[str, Any]) -> str:
    evaluations = results["evaluations"]
    lowest = min(evaluations, key=lambda entry: entry["eval_loss"])
    by_step = {entry["step"]: entry for entry in evaluations}
    rows = [
        [f"step {step}", f"{by_step[step]['eval_train_loss']:.2f} / {by_step[step]['eval_loss']:.2f}", book]
        for step, book in ((0, "10.99 / 10.98"), (85, "0.57 / 6.37"))
    ]
    rows.append(["lowest validation", f"{lowest['eval_loss']:.2f} at step {lowest['step']}", "about 6.12 near step 50"])
    return table(["train / validation loss", "hfllm", "the book"], rows)


def instruction_throughput_table(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{numbers['median']:,.0f} ({numbers['lowest']:,.0f} to {numbers['highest']:,.0f})"]
        for name, numbers in results["tokens_per_second"].items()
    ]
    ratio = results["ratio"]
    rows.append(["ratio", f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"])
    return table(["", "tokens of text per second, one thread"], rows)


def muon_processes_table(results: dict[str, Any]) -> str:
    measured, on_paper = results["measured"], results["on_64_gpus_in_bfloat16"]
    rows = [
        [name, f"{each['seconds']:.2f} s", f"{each['cpu_seconds']:.2f} s", f"{each['bytes_sent'] / 1e6:.1f} MB"]
        for name, each in measured.items()
    ]
    here = table(["6 blocks of 384, float32", "wall time", "CPU time", "sent by a process"], rows)
    rows = [
        [
            name,
            f"{each['flops'] / 1e12:.2f}",
            f"{1e3 * each['seconds_computing']:.1f} ms",
            f"{each['bytes_sent'] / 1e9:.3f} GB",
            f"{1e3 * each['seconds_sending']:.1f} ms",
        ]
        for name, each in on_paper.items()
    ]
    head = ["on paper: 64 GPUs, bfloat16", "TFLOP of a GPU", "at 400 TFLOP/s", "sent by a GPU", "at 50 GB/s"]
    return f"{here}\n\n{table(head, rows)}"


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo_table,
    "time_to_quality": time_to_quality_table,
    "training_step": training_step_table,
    "decoding": decoding_table,
    "scaling": scaling_table,
    "sms": sms_table,
    "docstrings": docstrings_table,
    "book": book_table,
    "instruction_throughput": instruction_throughput_table,
    "muon_processes": muon_processes_table,
}


if __name__ == "__main__":
    main()
