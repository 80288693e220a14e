import json

import pytest

from hfllm.cli.arguments import parse_arguments
from tests.recipes.conftest import load_recipe


recipe = load_recipe("report")


def run(*argv) -> None:
    recipe.main(parse_arguments(recipe.ReportArguments, list(map(str, argv))))


@pytest.fixture
def make_folder(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
        (tmp_path / name / "metrics.json").write_text(json.dumps({"eval_loss": 1.75}))
        return tmp_path / name

    return make


def test_a_runs_page_is_written_into_its_folder(make_folder, capsys):
    folder = make_folder("a")
    run("--runs", folder)
    assert "1.7500" in (folder / "report.html").read_text()
    assert f"{folder}/report.html" in capsys.readouterr().out


def test_two_runs_make_a_page_where_it_is_wanted(make_folder, tmp_path):
    run("--runs", make_folder("a"), make_folder("b"), "--output_file", tmp_path / "new" / "compare.html")
    assert "Training loss" in (tmp_path / "new" / "compare.html").read_text()


def test_a_page_cannot_take_the_place_of_a_folder(make_folder, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; give the name of a file in it, for example .*report.html"):
        run("--runs", make_folder("a"), "--output_file", tmp_path)
