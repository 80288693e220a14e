"""A run's page: one HTML file that holds everything it shows and loads nothing from elsewhere.

Its content may come from a model or a dataset, so every text is escaped, and the page's own policy allows only our
script (by its hash), and no image, font or request from elsewhere.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..runs.files import write_text
from .charts import Line, chart, line_of
from .escaping import html_text
from .run import Confusion, Run, is_confusion
from .words import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    format_seconds,
    format_value,
    is_classifier,
    label_of,
    plain_value,
    problem_type_of,
    sentence_about,
    short_number,
)


PAGE_FILE = "report.html"
SHOWN_SAMPLES = 6
# Panels of one number each: its name in the log, its title, its unit. The losses have a panel of their own.
PANELS = (
    ("eval_bits_per_byte", "Bits per byte", "validation"),
    ("eval_accuracy", "Accuracy", "validation"),
    ("eval_f1_micro", "F1", "validation, over all labels"),
    ("eval_f1_macro", "F1", "validation, mean over classes"),
    ("eval_mae", "Mean absolute error", "validation"),
    ("learning_rate", "Learning rate", ""),
    ("grad_norm", "Gradient norm", ""),
    ("tokens_per_second", "Throughput", "tokens per second"),
)
TILES = (
    *("test_accuracy", "eval_accuracy", "test_f1_micro", "eval_f1_micro", "test_f1_macro", "eval_f1_macro"),
    *("test_mae", "eval_mae", "test_r2", "eval_r2", "eval_bits_per_byte", "test_loss"),
    *("eval_loss", "eval_perplexity", "num_parameters", "train_tokens", "train_seconds", "tokens_per_second"),
)
MAX_TILES = 8


def write_page(run: Run, path: str | Path) -> Path:
    """Write the page of one run."""
    return _write(path, run.name, render_run(run))


def write_comparison(runs: Sequence[Run], path: str | Path) -> Path:
    """Write a page that compares several runs: curves in the same panels, final numbers, different arguments."""
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run cannot be compared; give two or more.")
    return _write(path, " and ".join(run.name for run in runs), render_comparison(runs))


def render_run(run: Run) -> str:
    """The page of one run, as HTML."""
    is_by_step = all(isinstance(heading, int) for heading, _ in run.samples)
    sections = [
        ("Curves", _curves(run)),
        ("What it wrote as training went" if is_by_step else "What it answers", _samples(run.samples)),
        ("Evaluation", _evaluation(run)),
        ("Tokenizer", _tokenizer(run.tokenizer_report)),
        ("Arguments", _arguments(run.arguments)),
        ("Model", _definitions(_shape(run), many=True)),
        ("Environment", _definitions(run.environment, many=True)),
    ]
    return _document(run.name, sentence_about(run), _tiles(run), sections)


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs, as HTML."""
    names = _distinct_names(runs)
    lead = f"{len(runs)} runs side by side."
    sections = [
        ("Curves", _compared_curves(runs, names)),
        ("Final numbers", _compared_numbers(runs, names)),
        ("What differs in the arguments", _compared_arguments(runs, names)),
        ("What they wrote at the end", _samples([(n, r.samples[-1][1]) for n, r in zip(names, runs) if r.samples])),
    ]
    return _document(" · ".join(names), lead, "", sections)


def _write(path: str | Path, title: str, content: str) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it, for example {path / PAGE_FILE}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    return path


def _document(title: str, lead: str, head: str, sections: Iterable[tuple[str, str]]) -> str:
    here = Path(__file__)
    style, script = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    kept = [(heading, _anchor(heading), body) for heading, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{html_text(heading)}</a>' for heading, anchor, _ in kept)
    bodies = "".join(
        f'<section id="{anchor}"><h2>{html_text(heading)}</h2>{body}</section>' for heading, anchor, body in kept
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html_text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{html_text(title)}</h1><p class="lead">{html_text(lead)}</p><nav>{links}</nav>{head}</header>
{bodies}
<footer>Made by hfllm from the run's own files. Nothing on this page comes from elsewhere.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def _tiles(run: Run) -> str:
    numbers = run.numbers
    shown = [name for name in TILES if name in numbers][:MAX_TILES]
    tiles = []
    for name in shown:
        value = numbers[name]
        if name in ("num_parameters", "train_tokens"):
            figure = short_number(value)
        else:
            figure = format_seconds(value) if name == "train_seconds" else format_value(value, name)
            figure = f"{value:.4g}" if name.endswith("perplexity") and value < 1000 else figure
        tiles.append(f'<div class="tile"><b>{html_text(figure)}</b><span>{html_text(label_of(name))}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _curves(run: Run) -> str:
    losses = [
        line_of(run.log, "loss", "training", color=0),
        line_of(run.log, "eval_loss", "validation", color=1, is_dotted=True),
        line_of(run.log, "eval_train_loss", "training rows, without dropout", color=2, is_dotted=True),
    ]
    charts = [
        chart("Loss", [line for line in losses if line], unit=_unit_of_loss(run), can_be_logarithmic=True),
        *(_panel(key, title, unit, [run], [""]) for key, title, unit in PANELS),
    ]
    drawn = [drawing for drawing in charts if drawing]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _unit_of_loss(run: Run) -> str:
    if not is_classifier(run):
        return "nats per token"
    units = {"regression": "mean squared error", "multi_label_classification": "nats per label"}
    return units.get(problem_type_of(run) or "", "nats per text")


def _panel(key: str, title: str, unit: str, runs: Sequence[Run], names: Sequence[str]) -> str:
    is_evaluation = key.startswith("eval_")
    lines = []
    for number, (run, name) in enumerate(zip(runs, names)):
        color = number if len(runs) > 1 else int(is_evaluation)
        line = line_of(run.log, key, name or label_of(key), color=color, is_dotted=is_evaluation)
        if line is not None:
            lines.append(line)
    return chart(title, lines, unit=unit, can_be_logarithmic=key == "grad_norm", from_zero=key == "tokens_per_second")


def _compared_curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    def lines(key: str, is_dotted: bool) -> list[Line]:
        found = (
            line_of(run.log, key, name, color=number, is_dotted=is_dotted)
            for number, (run, name) in enumerate(zip(runs, names))
        )
        return [line for line in found if line is not None]

    charts = [
        chart("Validation loss", lines("eval_loss", True), unit=_unit_of_loss(runs[0]), can_be_logarithmic=True),
        chart("Training loss", lines("loss", False), unit=_unit_of_loss(runs[0]), can_be_logarithmic=True),
        *(_panel(key, title, unit, runs, names) for key, title, unit in PANELS),
    ]
    drawn = [drawing for drawing in charts if drawing]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _samples(samples: Sequence[tuple[Any, str]]) -> str:
    if not samples:
        return ""
    # The first, the last, and some between; the others can be opened.
    places = {round(index * (len(samples) - 1) / (SHOWN_SAMPLES - 1)) for index in range(SHOWN_SAMPLES)}
    rows = [_sample(heading, text) for heading, text in samples]
    shown = "".join(row for index, row in enumerate(rows) if index in places)
    hidden = "".join(row for index, row in enumerate(rows) if index not in places)
    more = f"<details><summary>{len(rows) - len(places):,} more</summary>{hidden}</details>" if hidden else ""
    return f'<div class="card">{shown}{more}</div>'


def _sample(heading: Any, text: str) -> str:
    label = f"step {heading:,}" if isinstance(heading, int) else str(heading)
    return f'<div class="sample"><span class="quiet">{html_text(label)}</span><pre>{html_text(text)}</pre></div>'


def _evaluation(run: Run) -> str:
    plain = {
        name: value
        for name, value in run.metrics.items()
        if value is not None and not isinstance(value, (dict, list)) and not name.endswith("sha256")
    }
    parts = [f'<div class="card many">{_definition_list(plain)}</div>'] if plain else []
    tables = [_confusion(confusion) for confusion in run.confusions]
    for name, value in run.metrics.items():
        if isinstance(value, (dict, list)) and not is_confusion(name) and name != "labels":
            tables.append(_nested(name, value))
    parts += [f'<div class="card wide" style="margin-top:14px">{table}</div>' for table in tables if table]
    hashes = {name: value for name, value in run.metrics.items() if name.endswith("sha256")}
    if hashes:
        words = "; ".join(f"{label_of(name)} <code>{html_text(value)}</code>" for name, value in hashes.items())
        parts.append(f'<p class="quiet" style="overflow-wrap:anywhere">{words}</p>')
    return "".join(parts)


def _confusion(confusion: Confusion) -> str:
    head = "".join(f"<th>{html_text(label)}</th>" for label in confusion.labels)
    rows = ""
    for label, counts in zip(confusion.labels, confusion.counts):
        total = sum(counts) or 1
        cells = "".join(
            f'<td class="{"strong" if count > 0.55 * total else ""}" style="--share:{count / total:.3f}"'
            f' title="{count / total:.1%} of {html_text(label)}">{count:,}</td>'
            for count in counts
        )
        rows += f"<tr><th>{html_text(label)}</th>{cells}</tr>"
    return (
        f"<h3>{html_text(label_of(confusion.name))}</h3>"
        "<p class='quiet'>Rows are the true labels, columns the model's answers.</p>"
        f"<table class='confusion'><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _nested(name: str, value: Any) -> str:
    """A dict of dicts or a list of dicts as a table, a dict of values as a list; deeper values are left out."""
    title = f"<h3>{html_text(label_of(name))}</h3>"
    rows: list[tuple[str, dict[str, Any]]] = []
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        rows = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        rows = [(str(number), item) for number, item in enumerate(value, start=1)]
    elif isinstance(value, dict) and value:
        return title + _definition_list({k: v for k, v in value.items() if not isinstance(v, (dict, list))})
    elif isinstance(value, list) and value and not any(isinstance(item, list) for item in value):
        return f"{title}<p>{html_text(format_value(value[:50]))}{' ...' if len(value) > 50 else ''}</p>"
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    head = "".join(f'<th class="number">{html_text(label_of(column))}</th>' for column in columns)
    body = "".join(
        f"<tr><th>{html_text(key)}</th>"
        + "".join(f'<td class="number">{html_text(_cell(row.get(column, ""), column))}</td>' for column in columns)
        + "</tr>"
        for key, row in rows
    )
    return f"{title}<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any, name: str) -> str:
    return "..." if isinstance(value, (dict, list)) else format_value(value, name)


def _tokenizer(report: dict[str, Any]) -> str:
    if not report:
        return ""
    rows = [("this tokenizer", report), *report.get("others", {}).items()]
    body = "".join(
        f"<tr><th>{html_text(name)}</th>"
        + "".join(
            f'<td class="number">{html_text(format_value(row.get(key)))}</td>'
            for key in ("vocab_size", "tokens", "bytes_per_token")
        )
        + "</tr>"
        for name, row in rows
    )
    tokens = "".join(f'<code class="token">{html_text(token)}</code>' for token in report.get("longest_tokens", []))
    measured = html_text(report.get("measured_on", "the text"))
    return f"""<div class="card"><div class="wide"><table><thead><tr><th></th><th class="number">vocabulary</th>
<th class="number">tokens</th><th class="number">bytes per token</th></tr></thead><tbody>{body}</tbody></table></div>
<p class="quiet">On {format_value(report.get("bytes"))} bytes of {measured}; never used there:
{format_value(report.get("unused_ids"))} ids.</p>
{f'<p class="quiet">Its longest tokens:</p><p>{tokens}</p>' if tokens else ""}</div>"""


def _arguments(arguments: dict[str, Any]) -> str:
    """The options by their own names; those that were not given and have no default are left out."""
    items = "".join(
        f"<div><dt><code>{_breakable(name)}</code></dt><dd>{html_text(plain_value(value))}</dd></div>"
        for name, value in arguments.items()
        if value is not None
    )
    return f'<div class="card many"><dl>{items}</dl></div>' if items else ""


def _breakable(name: str) -> str:
    """An option's name that a narrow column may break after an underscore."""
    return html_text(name).replace("_", "_<wbr>")


def _definitions(values: dict[str, Any], *, many: bool = False) -> str:
    return f'<div class="card{" many" if many else ""}">{_definition_list(values)}</div>' if values else ""


def _definition_list(values: dict[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{html_text(label_of(name))}</dt><dd>{html_text(format_value(value, name))}</dd></div>"
        for name, value in values.items()
        if not isinstance(value, dict)
    )
    return f"<dl>{items}</dl>"


def _shape(run: Run) -> dict[str, Any]:
    """The fields of the model's config that describe its shape."""
    source = run.adapter or run.config
    fields = (
        *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("position_embedding_type", "norm_type", "hidden_act", "gated_mlp", "use_qk_norm", "tie_word_embeddings"),
        *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"),
        "task_type",
    )
    return {name: source[name] for name in fields if source.get(name) is not None}


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names: list[str] = []
    for run in runs:
        names.append(run.name if run.name not in names else f"{run.name} ({len(names) + 1})")
    return names


def _compared_numbers(runs: Sequence[Run], names: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.numbers))
    rows = []
    for key in keys:
        values = [run.numbers.get(key) for run in runs]
        known = [value for value in values if value is not None]
        base = key.split("_", 1)[1] if key.startswith(("eval_", "test_")) else key
        choose = min if base.startswith(LOWER_IS_BETTER) else max if base.startswith(HIGHER_IS_BETTER) else None
        best = choose(known) if choose and len(set(known)) > 1 else None
        cells = "".join(
            f'<td class="number{" best" if best is not None and value == best else ""}">'
            f"{html_text(format_value(value, key)) if value is not None else ''}</td>"
            for value in values
        )
        rows.append(f"<tr><th>{html_text(label_of(key))}</th>{cells}</tr>")
    return _comparison_table(names, rows)


def _compared_arguments(runs: Sequence[Run], names: Sequence[str]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.arguments)
    rows = []
    for key in keys:
        values = [plain_value(run.arguments.get(key)) for run in runs]
        if len(set(values)) > 1:
            cells = "".join(f'<td class="number">{html_text(value)}</td>' for value in values)
            rows.append(f"<tr><th><code>{html_text(key)}</code></th>{cells}</tr>")
    return _comparison_table(names, rows)


def _comparison_table(names: Sequence[str], rows: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(
        f'<th class="number"><span class="key s{number % 8}">{html_text(name)}</span></th>'
        for number, name in enumerate(names)
    )
    return (
        f'<div class="card wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )
