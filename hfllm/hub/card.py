"""The model card: README.md, made from the run's files, with metadata that the Hub understands.

The part that hfllm writes is between two marks, each on its own line, and is replaced each time; text that a person
adds outside them stays.
"""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..report import write_page
from ..report.escaping import markdown_block, markdown_code, markdown_text
from ..report.page import PAGE_FILE
from ..report.run import Run, is_hub_id, is_place, read_run, without_places
from ..report.words import (
    dataset_in_words,
    format_value,
    is_chat,
    is_classifier,
    label_of,
    plain_value,
    problem_type_of,
    sentence_about,
)
from ..runs.files import write_text


CARD_FILE = "README.md"
BEGIN, END = "<!-- written by hfllm: begin -->", "<!-- written by hfllm: end -->"
WRITTEN = re.compile(rf"^{BEGIN}$.*?^{END}$", re.MULTILINE | re.DOTALL)
# What PEFT and transformers' Trainer write into an empty card.
BOILERPLATE = ("# Model Card for Model ID", "This model card has been generated automatically")
METRICS = {  # of metrics.json -> type and name of the Hub's metric
    "loss": ("loss", "loss, nats"),
    "perplexity": ("perplexity", "perplexity"),
    "bits_per_byte": ("bits_per_byte", "bits per byte"),
    "accuracy": ("accuracy", "accuracy"),
    "f1_macro": ("f1", "F1, mean over classes"),
    "f1": ("f1", "F1"),
    "f1_micro": ("f1", "F1, over all labels"),
    "subset_accuracy": ("accuracy", "texts with all labels right"),
    "mse": ("mse", "mean squared error"),
    "mae": ("mae", "mean absolute error"),
    "r2": ("r_squared", "R2"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "spearman": ("spearmanr", "Spearman correlation"),
    "exact_match": ("exact_match", "exact match"),
}
SPLITS = {"eval": "validation", "test": "test"}
PICTURES = {
    "curves.png": "Curves of the training",
    "confusion.png": "What it confuses",
    "labels.png": "How well it finds each label",
    "predictions.png": "Numbers that it says, beside the true ones",
}
MAX_SAMPLE_CHARACTERS = 1200


class Markdown(str):
    """A cell that is Markdown already; any other is text and gets escaped."""


def write_card(folder: str | Path, *, repo_id: str | None = None, base_model: str | None = None) -> bool:
    """Write the card into a run's folder; False if it has a card that a person wrote.

    It contains no paths of this machine. The card's commands open `repo_id`; without one, they name the folder.
    """
    folder = Path(folder).expanduser()
    path = folder / CARD_FILE
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    pictures = [name for name in PICTURES if (folder / name).exists()]
    new = make_card(read_run(folder), repo_id=repo_id, base_model=base_model, pictures=pictures)
    merged = join_cards(new, old)
    if merged is None:
        return False
    write_text(path, merged)
    return True


def write_page_and_card(folder: str | Path) -> None:
    """Write a run's page, `report.html`, and its model card, `README.md`."""
    folder = Path(folder).expanduser()
    write_page(read_run(folder), folder / PAGE_FILE)
    write_card(folder)


def make_card(
    run: Run, *, repo_id: str | None = None, base_model: str | None = None, pictures: Iterable[str] = ()
) -> str:
    """The card's text: metadata between `---`, and the text between the two marks."""
    base = base_model or _base_of(run)
    run = without_places(run)
    metadata = _metadata(run, repo_id=repo_id, base_model=base)
    name = repo_id or run.name
    parts = [
        f"# {markdown_text(name.split('/')[-1])}",
        f"{markdown_text(sentence_about(run))} Made with hfllm.",
        "## How to use it\n\n" + _usage(run, name, base),
        _results(run),
        *(f"![{PICTURES[name]}]({name})" for name in pictures),
        _samples(run),
        "## Data\n\n" + _data(run),
        "## Model\n\n" + _table({**_shape(run), "parameters": run.metrics.get("num_parameters")}),
        "## Training\n\n" + _table(_hyper_parameters(run)),
        _costs(run),
        "## Limits\n\n" + _limits(run),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{metadata.to_yaml()}\n---\n\n{BEGIN}\n\n{body}\n\n{END}\n"


def join_cards(new: str, old: str) -> str | None:
    """The new card with a person's additions to the old one: text outside the marks, and metadata of other names.

    Text outside the new card's marks goes before the old one's. None if hfllm did not write the old card, which then
    stays as it is.
    """
    if not old.strip() or any(words in old for words in BOILERPLATE):
        return new
    new_card, old_card = ModelCard(new, ignore_metadata_errors=True), ModelCard(old, ignore_metadata_errors=True)
    if old_card.text.strip() and not WRITTEN.search(old_card.text):
        return None
    metadata = {**old_card.data.to_dict(), **new_card.data.to_dict()}
    before, between, after = _cut_at_marks(new_card.text)
    old_before, _, old_after = _cut_at_marks(old_card.text)
    text = "\n\n".join(part for part in (before or old_before, between, after or old_after) if part)
    return f"---\n{ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()}\n---\n\n{text}\n"


def choose_card(made: str, *, here: str, there: str) -> str:
    """The card to push: the one just made, joined with those in the folder and in the repository.

    A card that a person wrote without our marks stays as it is; the folder's takes precedence over the repository's.
    """
    card = join_cards(made, here)
    if card is None:
        return here
    joined = join_cards(card, there)
    return there if joined is None else joined


def _cut_at_marks(text: str) -> tuple[str, str, str]:
    """The text before the marks, between them (marks included), and after them; without marks, all before."""
    found = WRITTEN.search(text)
    if found is None:
        return "", "", ""
    return text[: found.start()].strip(), found[0], text[found.end() :].strip()


def _metadata(run: Run, *, repo_id: str | None, base_model: str | None) -> ModelCardData:
    dataset = _dataset(run)  # trained on
    task = "text-classification" if is_classifier(run) else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=measured_on if is_hub_id(measured_on) and measured_on != "stdlib" else "text",
            dataset_name="Python's standard library" if measured_on == "stdlib" else measured_on,
            dataset_split=SPLITS[split],
            dataset_args=_dataset_hash(run) if measured_on == dataset else None,
            metric_type=METRICS[metric][0],
            metric_name=METRICS[metric][1],
            metric_value=value,
        )
        for name, value in run.numbers.items()
        for split, _, metric in [name.partition("_")]
        for measured_on in [_measured_on(run, name)]
        if split in SPLITS and metric in METRICS
    ]
    model_type = run.config.get("model_type")
    return ModelCardData(
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        datasets=[dataset] if "/" in dataset and is_hub_id(dataset) else None,
        library_name="peft" if run.adapter else "transformers",
        pipeline_tag=task,
        tags=[
            "hfllm",
            *([model_type] if model_type and model_type != "hfllm_gpt" else []),
            *["lora"] * bool(run.adapter),
        ],
        model_name=(repo_id or run.name).split("/")[-1],
        eval_results=results or None,
    )


def _usage(run: Run, name: str, base: str | None) -> str:
    """Commands that run as written, in a process without hfllm."""
    trust = ", trust_remote_code=True" if run.config.get("model_type", "hfllm_gpt") == "hfllm_gpt" else ""
    prompt = run.arguments.get("sample_prompt") or ("import " if run.arguments.get("dataset") == "stdlib" else "The ")
    quoted = json.dumps(name)
    if run.adapter:
        return _adapter_usage(run, quoted, base)
    if is_chat(run):
        return _chat_usage(run, name, trust)
    if is_classifier(run):
        return _classifier_usage(run, quoted, trust)
    text = f"""```python
from transformers import pipeline

write = pipeline("text-generation", {quoted}{trust})
print(write({json.dumps(prompt)}, max_new_tokens=40)[0]["generated_text"])
```
"""
    if trust:
        text += f"""
The model brings its own code, which `trust_remote_code=True` runs; with hfllm installed, `import hfllm` does instead.
From its checkout:

```
python recipes/generate.py --model {shlex.quote(name)} --prompt {shlex.quote(prompt)}
```
"""
    return text


def _classifier_usage(run: Run, quoted: str, trust: str) -> str:
    problem_type = problem_type_of(run)
    call = 'classify("A text to sort.")'
    if problem_type == "multi_label_classification":
        call = '[each for each in classify("A text to sort.", top_k=None) if each["score"] > 0.5]'
    elif problem_type == "regression":
        call = 'classify("A text to judge.")[0]["score"]'
    text = f"""```python
from transformers import pipeline

classify = pipeline("text-classification", {quoted}{trust})
print({call})
```
"""
    if run.arguments.get("long_texts") == "window":
        text += """
It was trained, and measured, on long texts in windows whose logits are averaged. A pipeline reads the first window only
(`truncation=True`); `predict_texts` of `hfllm.evaluation.classification` reads all.
"""
    return text


def _chat_usage(run: Run, name: str, trust: str) -> str:
    question = next((heading for heading, _ in run.samples if isinstance(heading, str)), "What can you tell me?")
    code = f"""from transformers import pipeline

chat = pipeline("text-generation", {json.dumps(name)}{trust})
messages = [{{"role": "user", "content": {json.dumps(question, ensure_ascii=False)}}}]
print(chat(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])
"""
    return f"""{markdown_block(code, "python")}

The prompt must be written by the tokenizer's chat template, as `pipeline` and `apply_chat_template` do. From hfllm's
checkout, in the terminal, as a web page (`--web`) or as an OpenAI-compatible server (`--serve`):

{markdown_block(f"python recipes/chat.py --model {shlex.quote(name)}", "")}"""


def _adapter_usage(run: Run, quoted: str, base: str | None) -> str:
    where = json.dumps(base) if base else "..."
    notes = [] if base and is_hub_id(base) else ["Its base is not on the Hub: put the base's folder in place of `...`."]
    auto, options, example = "AutoModelForCausalLM", "", ""
    if is_classifier(run):
        auto = "AutoModelForSequenceClassification"
        labels = run.adapter_base.get("id2label") or run.config.get("id2label")
        names = ", ".join(
            f"{int(index)}: {json.dumps(name, ensure_ascii=False)}" for index, name in (labels or {}).items()
        )
        options = f", id2label={{{names}}}" if labels else ", num_labels=..."
        if not labels:
            notes.append("It does not say its labels: put their number in place of `num_labels=...`.")
        pooling = run.adapter_base.get("classifier_pooling") or run.arguments.get("pooling") or "last"
        if pooling != "last":
            options += f", classifier_pooling={json.dumps(pooling)}"
        problem_type = problem_type_of(run)
        shown = "model.config.id2label[logits.argmax().item()]"
        if problem_type == "multi_label_classification":
            shown = "[model.config.id2label[index] for index in (logits[0] > 0).nonzero()[:, 0].tolist()]"
        elif problem_type == "regression":
            shown = "logits.item()"
        if problem_type not in (None, "single_label_classification"):
            options += f", problem_type={json.dumps(problem_type)}"
        example = f"""
logits = model(**tokenizer("A text to sort.", return_tensors="pt")).logits
print({shown})
"""
    return f"""```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained({where}{options}, trust_remote_code=True)
model = PeftModel.from_pretrained(base, {quoted})
tokenizer = AutoTokenizer.from_pretrained({where}, trust_remote_code=True)
{example}```

{chr(10).join(notes)}"""


def _results(run: Run) -> str:
    rows = {
        label_of(name): format_value(value, name)
        for name, value in run.numbers.items()
        if name.startswith(("eval_", "test_"))
    }
    if not rows:
        return ""
    note = ""
    if any("bits_per_byte" in name for name in run.numbers):
        note = "\n\nSums over every token, divided by their count. Bits per byte do not depend on the tokenizer."
    if (measured_on := run.metrics.get("test_dataset")) is not None:
        note += f"\n\nTest numbers were measured afterwards, on {markdown_code(measured_on)}."
    return f"## Results\n\n{_table(rows)}{note}"


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    heading, text = run.samples[-1]
    asked = f"What it wrote when asked: {markdown_text(heading)}"
    said = f"What it wrote at step {heading:,}" if isinstance(heading, int) else asked
    return f"## A sample\n\n{said}\n\n{markdown_block(text[:MAX_SAMPLE_CHARACTERS])}"


def _dataset(run: Run) -> str:
    return str(run.metrics.get("dataset") or run.arguments.get("dataset") or "unknown text")


def _measured_on(run: Run, name: str) -> str:
    """The dataset of a number: the run's own, or the one that `recipes/evaluate_model.py` used afterwards."""
    is_later = name in run.metrics.get("evaluated", [])
    return str(run.metrics.get("test_dataset") or _dataset(run)) if is_later else _dataset(run)


def _dataset_hash(run: Run) -> dict[str, str] | None:
    return {"sha256": run.metrics["corpus_sha256"]} if run.metrics.get("corpus_sha256") else None


def _data(run: Run) -> str:
    dataset = _dataset(run)
    what = markdown_code(dataset)
    if dataset == "stdlib":
        what += f": {markdown_text(dataset_in_words(run))}"
    rows: dict[str, Any] = {"dataset": Markdown(what)}
    for name in ("dataset_config", "split", "text_column", "label_column", "validation_fraction"):
        if run.arguments.get(name) not in (None, ""):
            rows[name.replace("_", " ")] = plain_value(run.arguments[name])
    for name in ("corpus_sha256", "tokenizer_sha256"):
        if run.metrics.get(name):
            rows[label_of(name)] = Markdown(markdown_code(run.metrics[name]))
    if run.metrics.get("train_tokens"):
        rows["training tokens"] = f"{run.metrics['train_tokens']:,}"
    return _table(rows)


def _shape(run: Run) -> dict[str, Any]:
    names: tuple[str, ...] = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type")
    if not run.adapter:
        names = (
            *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings", "vocab_size", "position_embedding_type", "norm_type"),
            *("hidden_act", "tie_word_embeddings"),
        )
    source = run.adapter or run.config
    return {name.replace("_", " "): plain_value(source[name]) for name in names if source.get(name) is not None}


# Entries that are elsewhere on the card, or do not describe the model.
NOT_HYPER_PARAMETERS = {
    *("dataset", "dataset_config", "split", "text_column", "label_column", "validation_fraction", "tokenizer"),
    *("output_dir", "cache_dir", "overwrite_output_dir", "dry_run", "report_to", "logging_steps", "save_steps"),
    *("save_total_limit", "sample_tokens", "config", "on_bad_record", "push_to_hub", "hub_model_id", "hub_strategy"),
    *("hub_private_repo", "sample_prompt"),
}


def _hyper_parameters(run: Run) -> dict[str, str]:
    return {
        Markdown(f"`{name}`"): plain_value(value)
        for name, value in run.arguments.items()
        if name not in NOT_HYPER_PARAMETERS and value not in (None, False)
    }


def _costs(run: Run) -> str:
    rows = {}
    for name in ("train_steps", "train_tokens", "train_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"):
        if run.metrics.get(name) is not None:
            rows[label_of(name)] = format_value(run.metrics[name], name)
    for name, value in run.environment.items():
        if value not in (None, [], ""):
            rows[label_of(name)] = format_value(value, name)
    return f"## Hardware, time, versions\n\n{_table(rows)}" if rows else ""


def _limits(run: Run) -> str:
    context = run.config.get("max_position_embeddings")
    window = f" It reads {context:,} tokens at most." if context else ""
    parameters = run.metrics.get("num_parameters") or 0
    small = " It is a small model, made to learn from: what it says is often wrong." if parameters < 1e9 else ""
    if is_classifier(run):
        gives = {
            "regression": "It knows the kind of text it was trained on, and says a number of every text, however "
            "little it fits.",
            "multi_label_classification": "It knows the labels and the kind of text it was trained on, and looks for "
            "nothing else.",
        }
        one = "It knows the labels and the kind of text it was trained on, and gives every text one of them, however "
        says = gives.get(problem_type_of(run) or "", f"{one}little it fits.")
        return f"{says}{window} The numbers above are valid for texts like those of its dataset."
    if is_chat(run):
        return (
            f"It answers questions of the kind it was fine-tuned on. It answers other questions too, but wrongly."
            f"{window}{small} Nothing was done to make its answers safe. Check what it writes before you use it."
        )
    return (
        f"It continues text in the style of its training data, with the errors and biases of that data."
        f"{window}{small} Nothing was done to make its answers safe. Check what it writes before you use it."
    )


def _table(rows: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return value if isinstance(value, Markdown) else markdown_text(value)

    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _base_of(run: Run) -> str | None:
    """The Hub id of the model it was made from, or None."""
    name = run.adapter.get("base_model_name_or_path") or run.arguments.get("model")
    return str(name) if name and not is_place(str(name)) else None
