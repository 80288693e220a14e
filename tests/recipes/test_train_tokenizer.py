import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfllm.cli.arguments import parse_arguments
from hfllm.cli.options import TextColumn, TrainingDataset, values_of
from hfllm.runs.lock import run_lock
from hfllm.tokenization import tokenizer_fingerprint


RECIPES = Path(__file__).parents[2] / "recipes"
specification = importlib.util.spec_from_file_location("train_tokenizer", RECIPES / "train_tokenizer.py")
recipe = importlib.util.module_from_spec(specification)
sys.modules["train_tokenizer"] = recipe  # dataclasses look their module up
specification.loader.exec_module(recipe)


@pytest.fixture
def arguments(tmp_path):
    """Ten documents of the same length, each full of its own word, which becomes a token if it is trained on."""
    words = ["apple", "bread", "chair", "dance", "eagle", "fruit", "grape", "house", "igloo", "joker"]
    lines = [json.dumps({"text": f" {word}" * 100}) for word in words]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    return recipe.TokenizerArguments(
        dataset=str(tmp_path / "words.jsonl"),
        validation_fraction=0.1,
        vocab_size=350,  # more than these texts give
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "tokenizer"),
    )


def report_of(arguments) -> dict:
    return json.loads((Path(arguments.output_dir) / "tokenizer_report.json").read_text())


def test_it_trains_on_the_training_documents_and_reports_on_the_others(arguments, capsys):
    recipe.main(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    words = [token for token in tokenizer.get_vocab() if token.startswith("Ġ") and len(token) == 6]
    assert len(words) == 9  # the tenth is held out

    report = report_of(arguments)
    assert report["measured_on"] == "held-out documents"
    assert (report["texts"], report["bytes"]) == (1, 600)  # six bytes, a hundred times
    assert report["tokens"] > 100
    assert report["fingerprint"] == tokenizer_fingerprint(tokenizer)
    written = yaml.safe_load((Path(arguments.output_dir) / "arguments.yaml").read_text())
    assert written["vocab_size"] == 350

    said = capsys.readouterr().out
    assert f"--dataset {arguments.dataset} --validation_fraction 0.1 --tokenizer {arguments.output_dir}" in said


def test_without_held_out_documents_the_report_says_what_it_measured(arguments):
    arguments.validation_fraction = 0.0
    recipe.main(arguments)
    report = report_of(arguments)
    assert (report["measured_on"], report["bytes"]) == ("training documents", 6000)
    assert report["tokens"] == 1000


def test_the_same_tokenizer_is_not_trained_again(arguments, capsys, monkeypatch):
    recipe.main(arguments)
    monkeypatch.setattr(recipe, "train_bpe", lambda *_, **__: pytest.fail("trained again"))
    capsys.readouterr()
    arguments.compare_with = [arguments.output_dir]
    recipe.main(arguments)
    assert "holds this tokenizer already" in capsys.readouterr().out
    report = report_of(arguments)
    assert report["others"][arguments.output_dir]["tokens"] == report["tokens"]  # what was asked for is still done


def test_a_tokenizer_below_the_folder_of_its_text_is_not_a_text(arguments, tmp_path, capsys):
    arguments.dataset = str(tmp_path)
    recipe.main(arguments)
    recipe.main(arguments)
    assert "holds this tokenizer already" in capsys.readouterr().out


def test_another_tokenizer_is_replaced_only_when_told_to(arguments):
    arguments.vocab_size = 280
    recipe.main(arguments)
    arguments.vocab_size = 270
    with pytest.raises(ValueError, match=r"vocab_size was 280 and is 270\n.*overwrite_output_dir"):
        recipe.main(arguments)
    assert len(AutoTokenizer.from_pretrained(arguments.output_dir)) == 280

    arguments.overwrite_output_dir = True
    recipe.main(arguments)
    assert len(AutoTokenizer.from_pretrained(arguments.output_dir)) == 270
    assert not list(Path(arguments.output_dir).parent.glob("tokenizer.*"))  # nothing is left beside it


def test_other_text_makes_another_tokenizer(arguments):
    recipe.main(arguments)
    with Path(arguments.dataset).open("a") as file:
        file.write('\n{"text": "one document more"}')
    with pytest.raises(ValueError, match="belongs to another run:\n    corpus_sha256 was "):
        recipe.main(arguments)


def test_a_tokenizer_that_was_changed_by_hand_is_not_taken_for_ours(arguments):
    recipe.main(arguments)
    file = Path(arguments.output_dir) / "tokenizer.json"
    file.write_text(file.read_text().replace('"single_word": false', '"single_word": true', 1))
    with pytest.raises(ValueError, match=r"tokenizer.json has changed since it was written"):
        recipe.main(arguments)


def test_an_interrupted_run_leaves_no_tokenizer_behind(arguments, monkeypatch):
    def interrupted(self, folder, **_):
        (Path(folder) / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        recipe.main(arguments)
    output_dir = Path(arguments.output_dir)
    assert not output_dir.exists()

    recipe.main(arguments)
    assert AutoTokenizer.from_pretrained(output_dir).eos_token_id == 1
    beside = {path.name for path in output_dir.parent.iterdir()}
    assert beside == {"words.jsonl", "cache", "tokenizer"}


@pytest.mark.fault(32)
def test_a_folder_with_other_things_in_it_keeps_them(arguments):
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir()
    (output_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that no run made, .*thesis.txt"):
        recipe.main(arguments)
    arguments.overwrite_output_dir = True
    for _ in range(2):
        recipe.main(arguments)
    assert (output_dir / "thesis.txt").read_text() == "years of work"
    (output_dir / "run.json").unlink()  # as if somebody else had made the tokenizer
    (output_dir / "arguments.yaml").unlink()
    before = (output_dir / "tokenizer.json").read_bytes()
    arguments.vocab_size -= 1
    with pytest.raises(ValueError, match=r"holds files that no run made, .*tokenizer.json"):
        recipe.main(arguments)
    assert (output_dir / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_of_a_version_that_kept_no_record_is_still_this_one(arguments, capsys):
    recipe.main(arguments)
    record = Path(arguments.output_dir) / "run.json"
    record.unlink()
    capsys.readouterr()
    recipe.main(arguments)
    assert "holds this tokenizer already" in capsys.readouterr().out
    record.unlink()
    arguments.max_bytes -= 1
    with pytest.raises(ValueError, match="max_bytes was 1073741824 and is 1073741823"):
        recipe.main(arguments)


@pytest.mark.fault(33)
def test_two_tokenizers_into_one_folder_at_once_are_refused(arguments):
    with run_lock(arguments.output_dir), pytest.raises(RuntimeError, match="Another run is using"):
        recipe.main(arguments)


def test_an_output_dir_that_is_a_file_is_refused_before_the_work(arguments, monkeypatch):
    monkeypatch.setattr(recipe, "load_corpus", lambda *_, **__: pytest.fail("began to work"))
    arguments.output_dir = arguments.dataset
    with pytest.raises(ValueError, match="is a file"):
        recipe.main(arguments)
    arguments.output_dir = f"{arguments.dataset}/tokenizer"
    with pytest.raises(OSError, match="cannot be used"):
        recipe.main(arguments)


def test_several_processes_are_refused(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start this recipe with python"):
        recipe.main(arguments)


def test_the_demo_configuration_fits_the_recipe_and_the_next_chapter():
    arguments = parse_arguments(recipe.TokenizerArguments, ["--config", str(RECIPES / "configs/tokenizer_demo.yaml")])
    next_chapter = yaml.safe_load((RECIPES / "configs/pretrain_demo.yaml").read_text())
    for name in ("dataset", "validation_fraction"):
        assert getattr(arguments, name) == next_chapter[name] == recipe.PRETRAIN_DEMO[name]
    assert recipe.pretrain_options(arguments) == "--config recipes/configs/pretrain_demo.yaml"


def test_the_command_at_the_end_sizes_a_run_on_another_text_by_time_and_names_what_pretraining_would_not_assume():
    arguments = recipe.TokenizerArguments(dataset="my text.txt", text_column="body")
    assert recipe.pretrain_options(arguments) == "--max_train_minutes 5 --dataset 'my text.txt' --text_column body"
    arguments = recipe.TokenizerArguments(validation_fraction=0.1)
    demo = "--config recipes/configs/pretrain_demo.yaml"
    assert recipe.pretrain_options(arguments) == f"{demo} --validation_fraction 0.1"

    specification = importlib.util.spec_from_file_location("pretrain", RECIPES / "pretrain.py")
    pretrain = importlib.util.module_from_spec(specification)
    sys.modules["pretrain"] = pretrain
    specification.loader.exec_module(pretrain)
    for name in values_of(arguments, TrainingDataset, TextColumn):
        assert getattr(recipe.TokenizerArguments, name) == getattr(pretrain.PretrainArguments, name)


def test_a_mistake_on_the_command_line_is_answered_without_a_traceback(tmp_path):
    command = [sys.executable, str(RECIPES / "train_tokenizer.py"), "--dataset", "./nothing.txt"]
    command += ["--output_dir", str(tmp_path / "tokenizer")]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 2
    assert "There is no file or folder 'nothing.txt'" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "tokenizer").exists()
