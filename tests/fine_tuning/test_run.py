"""The shared run of the fine-tuning recipes, and Trainer's arguments."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hfllm
from hfllm.cli import options as groups
from hfllm.cli.options import arguments, differs, option
from hfllm.fine_tuning.run import FiniteUpdates, open_run, trackers, training_arguments
from hfllm.tokenization import train_bpe
from tests.conftest import make_tiny_config


@arguments
class Options(groups.Model, groups.Training, groups.Trackers, groups.Run):
    learning_rate = differs(0.25)
    per_device_train_batch_size = differs(1)
    logging_steps = differs(3)
    seed = differs(5)
    gradient_checkpointing: bool = option(True, help="Less memory.")
    max_answers: int = option(7, help="No argument of Trainer.")


def test_trainers_arguments_are_the_options_of_the_same_name_and_what_the_recipe_sets_wins(tmp_path):
    values = training_arguments(Options(output_dir=str(tmp_path)), learning_rate=0.5, eval_strategy="no")
    assert (values.logging_steps, values.seed, values.learning_rate) == (3, 5, 0.5)
    assert values.max_steps == -1 and values.report_to == []
    assert values.output_dir == str(tmp_path / "checkpoints")
    assert not values.gradient_checkpointing  # set up with LoRA, not by Trainer


@pytest.fixture
def base(tmp_path):
    """A folder with a model, and the model and the tokenizer."""
    model, tokenizer = hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=300)), train_bpe(["a text"], 300)
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base"), model, tokenizer


@pytest.fixture
def finished(base, tmp_path) -> Options:
    """The options of a run that came to its end."""
    folder, model, tokenizer = base
    args = Options(output_dir=str(tmp_path / "out"), model=folder)
    with open_run(args, recipe="x") as run:
        assert not run.is_finished(model, tokenizer, ROWS)
        trainer = SimpleNamespace(args=SimpleNamespace(world_size=1), state=SimpleNamespace(global_step=4))
        trainer.remove_callback = trainer.add_callback = lambda callback: None
        run.begin(trainer)
        with run.writing() as results:
            model.save_pretrained(results)
            run.save_metrics({"test_loss": 1.5}, results)
        run.finish(trainer)
    return args


ROWS = {"train": [[1, 2]], "eval": [[3]], "test": [[4, 5]]}


def is_finished(args: Options, model, tokenizer, rows=ROWS) -> bool:
    with open_run(args, recipe="x") as run:
        return run.is_finished(model, tokenizer, rows)


@pytest.mark.fault(20, 23)
def test_a_finished_run_is_recognized_and_what_is_missing_is_made(base, finished, capsys):
    _, model, tokenizer = base
    out = Path(finished.output_dir)
    assert json.loads((out / "metrics.json").read_text()) == {"test_loss": 1.5}
    assert {"report.html", "README.md", "arguments.yaml", "config.json"} <= {path.name for path in out.iterdir()}
    assert is_finished(finished, model, tokenizer)
    assert "nothing to do" in capsys.readouterr().out
    (out / "report.html").unlink()
    assert is_finished(finished, model, tokenizer)
    assert (out / "report.html").exists()
    (out / "model.safetensors").write_bytes(b"half")
    assert not is_finished(finished, model, tokenizer)


@pytest.mark.fault(19, 26)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("option", r"learning_rate was 0\.25 and is 0\.1"),
        ("batch", "rows_per_step was 1 and is 2"),
        ("rows", "train_sha256 was "),
        ("held-out rows", "test_sha256 was "),
        ("base", "base_sha256 was "),
        ("tokenizer", "tokenizer_sha256 was "),
        ("template", "tokenizer_sha256 was "),
    ],
)
def test_another_run_is_refused_with_the_difference(base, finished, what, message):
    folder, model, tokenizer = base
    rows = dict(ROWS)
    if what == "option":
        finished = dataclasses.replace(finished, learning_rate=0.1)
    elif what == "batch":
        finished = dataclasses.replace(finished, gradient_accumulation_steps=2)
    elif what == "rows":
        rows["train"] = [[1, 3]]
    elif what == "held-out rows":
        rows["test"] = [[4], [5]]
    elif what == "base":
        model.model.embed_tokens.weight.data[0, 0] += 1
        model.save_pretrained(folder)
    elif what == "tokenizer":
        tokenizer = train_bpe(["another text, another text"] * 9, 300)
    elif what == "template":
        tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=rf"belongs to another run:\n    {message}"):
        is_finished(finished, model, tokenizer, rows)


def test_the_batch_may_be_cut_in_another_way_and_the_log_written_more_often(base, finished):
    _, model, tokenizer = base
    args = dataclasses.replace(finished, gradient_accumulation_steps=1, logging_steps=1)
    assert is_finished(args, model, tokenizer)


@pytest.mark.fault(11)
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_in_the_end_stops_the_run():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    callback, args, state = FiniteUpdates(), SimpleNamespace(learning_rate=7.0), SimpleNamespace(global_step=41)

    def update(value: float) -> None:
        layer(torch.tensor([1.0, value])).backward()
        callback.on_pre_optimizer_step(args, state, None, model=layer, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(9):
        update(float("nan"))
    assert all(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))
    update(1.0)  # they are counted in a row
    assert not torch.equal(before[0], layer.weight)
    with pytest.raises(FloatingPointError, match=r"not finite 10 times in a row, up to step 42.*lower .* than 7\.0"):
        for _ in range(10):
            update(float("inf"))


def test_an_unknown_tracker_is_refused_with_the_known_ones():
    assert trackers(None) == trackers(["none"]) == "none" and trackers(["all"]) == "all"
    with pytest.raises(ValueError, match=r"report_to wandby: choose from .*wandb"):
        trackers(["wandby"])
