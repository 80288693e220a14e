"""Prompts from a file: one per line of text, per row of a table, or per JSON object."""

from pathlib import Path

from .formats import TEXT, decoding_problem, format_of, read_lines, refusal
from .readers import read_file
from .records import ReadOptions, text_problem


def load_prompts(name: str, *, column: str = "prompt") -> list[str]:
    """The prompts in a file, in order; a line without a visible character holds none.

    In .jsonl, .json, .csv, .tsv, .parquet and .arrow files, `column` has the prompts; every other file is text.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"prompt_file={name!r} is not a file. Give a text file with one prompt per line, or a .jsonl.")
    if format_of(path) in ("", *TEXT):
        if problem := refusal(path) or decoding_problem(path):
            raise ValueError(f"prompt_file={name!r}: {problem}.")
        prompts = [line.rstrip("\r\n") for line in read_lines(path) if line.strip()]
    else:
        prompts = []
        for record in read_file(path, ReadOptions({column: "column"}, only={column})):
            columns = record.columns or {}
            problem = record.problem or text_problem(columns[column], column)
            if not problem and not columns[column]:
                problem = f"its {column!r} is empty"
            if problem:
                raise ValueError(f"prompt_file: {record.place}: {problem}.")
            prompts.append(columns[column])
    if not prompts:
        raise ValueError(f"prompt_file={name!r} holds no prompt.")
    return prompts
