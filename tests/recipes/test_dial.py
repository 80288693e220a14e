"""recipes/pretrain.py sized by one dial; tests/training/test_sizing.py has the numbers."""

import pytest
import yaml

from hfllm.training.sizing import SIZED, Speed


@pytest.fixture
def unsized(small) -> dict:
    """A run's options without those that the dial sets."""
    return {name: value for name, value in small.items() if name not in (*SIZED, "warmup_steps")}


def arguments_of(output_dir) -> dict:
    return yaml.safe_load((output_dir / "arguments.yaml").read_text())


def sized(options: dict) -> dict:
    return {name: arguments_of(options["output_dir"])[name] for name in SIZED}


def test_the_dial_sizes_a_run_tells_so_and_writes_it_down(run_pretrain, unsized, tmp_path, capsys):
    metrics = run_pretrain(**unsized, depth=1, learning_rate=0.03, max_steps=6)
    arguments = arguments_of(unsized["output_dir"])
    assert {"depth": 1, "hidden_size": 64, "num_attention_heads": 1, "eval_steps": 2}.items() <= arguments.items()
    # 1,024 tokens a step are 32 rows of 32.
    assert arguments["per_device_train_batch_size"] == 32
    assert metrics["train_tokens"] == 6 * 1024
    assert arguments["learning_rate"] == 0.03
    told = capsys.readouterr().out
    assert "Sized by depth 1" in told
    for name in SIZED:
        [line] = [line for line in told.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1] == str(arguments[name])
        assert line.endswith(" given") == (name in ("learning_rate", "max_steps"))
    # What it wrote makes the same run again, without a dial's help.
    again = {**unsized, "output_dir": tmp_path / "again", "config": unsized["output_dir"] / "arguments.yaml"}
    assert run_pretrain(**again)["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert sized(again) == sized(unsized)


def test_a_file_of_options_wins_over_the_dial_and_the_command_line_over_both(run_pretrain, unsized, tmp_path):
    (tmp_path / "sizes.yaml").write_text("hidden_size: 32\nnum_attention_heads: 2\nmax_steps: 3\n")
    options = {**unsized, "config": tmp_path / "sizes.yaml", "depth": 2}
    run_pretrain(**options, max_steps=2)
    found = sized(options)
    assert (found["num_hidden_layers"], found["hidden_size"], found["num_attention_heads"]) == (2, 32, 2)
    assert found["max_steps"] == 2


def test_a_run_that_resumes_keeps_the_sizes_it_began_with(run_pretrain, unsized, monkeypatch, capsys):
    """Whatever speed the machine has by then."""
    recipe = run_pretrain.recipe
    monkeypatch.setattr(recipe, "measure_speed", lambda *_: Speed(seconds_per_step=1.0, seconds_per_evaluation=1.0))
    options = {**unsized, "depth": 1, "max_train_minutes": 0.2}
    monkeypatch.setattr(recipe.StopRequest, "agreed", lambda self: True)
    with pytest.raises(SystemExit):
        run_pretrain(**options)
    began = sized(options)
    assert began["max_steps"] == 7  # 12 s, less five evaluations
    monkeypatch.undo()
    metrics = run_pretrain(**options)
    assert metrics["train_steps"] == 7
    assert sized(options) == began
    assert "Resuming from step 1" in (told := capsys.readouterr().out)
    assert "as the run in" in told
    other = r"holds a run of another size \(max_train_minutes: 0.2 there, 0.3 here\)"
    with pytest.raises(ValueError, match=f"{other}. To train that run for longer, .* a max_steps above 7"):
        run_pretrain(**{**options, "max_train_minutes": 0.3})
    assert run_pretrain(**options, max_steps=8)["train_steps"] == 8  # asked for by name, a run may be longer


def test_a_run_with_a_deadline_that_stopped_early_goes_on_with_a_larger_patience(
    run_pretrain, unsized, monkeypatch, capsys
):
    recipe = run_pretrain.recipe
    monkeypatch.setattr(recipe, "measure_speed", lambda *_: Speed(seconds_per_step=1.0, seconds_per_evaluation=1.0))
    # Each evaluation is worse than the one before.
    monkeypatch.setattr(recipe.TrainingState, "count_evaluation", count_as_worse)
    options = {**unsized, "depth": 1, "max_train_minutes": 0.2, "eval_steps": 2, "early_stopping_patience": 1}
    assert run_pretrain(**options)["train_steps"] == 2
    capsys.readouterr()
    run_pretrain(**options)
    assert "ended at step 2: nothing to do" in (told := capsys.readouterr().out)
    assert "a larger --early_stopping_patience" in told
    assert run_pretrain(**{**options, "early_stopping_patience": 2})["train_steps"] == 4
    del options["early_stopping_patience"]
    num_steps = run_pretrain(**options)["train_steps"]
    assert num_steps > 4
    run_pretrain(**options)
    assert f"ended at step {num_steps}: nothing to do" in capsys.readouterr().out


def count_as_worse(state) -> bool:
    state.num_evaluations_since_best += 1
    return False


def test_a_budget_of_time_is_measured_with_the_runs_own_steps(run_pretrain, unsized, capsys):
    run_pretrain(**unsized, max_train_minutes=1, num_hidden_layers=1, dry_run=True)
    told = capsys.readouterr().out
    assert "Sized by max_train_minutes 1.0" in told
    assert "4 passes over the text, because more would memorize it" in told  # it is short
    assert "nothing was written" in told


def test_a_streams_run_is_sized_by_tokens(run_pretrain, unsized):
    metrics = run_pretrain(**unsized, streaming=True, max_train_tokens=4 * 1024)
    assert metrics["train_steps"] == 4


REFUSED = {
    "a model": ({"depth": 2, "model": "somewhere"}, "`depth` is for random weights, and `model` has its own size"),
    "the book": ({"depth": 2, "preset": "book"}, "`depth` follows rules that were measured with preset=modern"),
    "adamw": ({"max_train_tokens": 9999, "optimizer": "adamw"}, "`max_train_tokens` follows .* optimizer=muon"),
    "two depths": ({"depth": 2, "num_hidden_layers": 3}, "depth=2 and num_hidden_layers=3 contradict each other"),
    "two lengths": ({"max_train_tokens": 9999, "num_train_epochs": 2}, "both say how long to train: give one"),
    "no time": ({"max_train_minutes": 0}, "--max_train_minutes 0.0: give more than 0"),
    "no depth": ({"depth": 0}, "--depth 0: give at least 1"),
    "less than a step": (
        {"max_train_tokens": 1000},
        r"max_train_tokens 1,000\) is too small for one step, of 1,024",
    ),
    "a stream's time": ({"max_train_minutes": 1, "streaming": True}, "A stream is read once"),
    "a stream's epochs": ({"depth": 1, "num_train_epochs": 1, "streaming": True}, "A stream is read once"),
}


@pytest.mark.parametrize(("options", "told"), REFUSED.values(), ids=REFUSED)
def test_what_the_dial_cannot_size_is_refused_with_what_would_do(run_pretrain, unsized, options, told):
    with pytest.raises(ValueError, match=told):
        run_pretrain(**unsized, **options)
