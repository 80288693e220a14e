"""What the fine-tuning recipes share: Trainer's arguments, and the run around Trainer."""

import dataclasses

import pytest

from hfllm.cli.arguments import save_arguments
from hfllm.fine_tuning.run import open_run, trackers, training_arguments


@dataclasses.dataclass
class Options:
    output_dir: str
    model: str = "nowhere"
    overwrite_output_dir: bool = False
    learning_rate: float = 0.25
    max_steps: int | None = None
    logging_steps: int = 3
    gradient_checkpointing: bool = True
    max_answers: int = 7  # no argument of Trainer
    report_to: list[str] | None = None
    seed: int = 5


def test_trainers_arguments_are_the_options_of_the_same_name_and_what_the_recipe_sets_wins(tmp_path):
    arguments = training_arguments(Options(str(tmp_path)), learning_rate=0.5, eval_strategy="no")
    assert (arguments.logging_steps, arguments.seed, arguments.learning_rate) == (3, 5, 0.5)
    assert arguments.max_steps == -1 and arguments.report_to == []
    assert arguments.output_dir == str(tmp_path / "checkpoints")
    assert not arguments.gradient_checkpointing  # set up with LoRA, not by Trainer


def test_a_finished_run_is_recognized_and_one_with_other_options_refused(tmp_path, capsys):
    args = Options(str(tmp_path / "out"))
    with open_run(args) as run:
        assert not run.is_finished and run.is_main
        save_arguments(args, run.output_dir / "arguments.yaml")
        run.finish({"test_loss": 1.5})
    assert (tmp_path / "out" / "metrics.json").read_text() == '{\n  "test_loss": 1.5\n}\n'
    with open_run(args) as run:
        assert run.is_finished
    assert "nothing to do" in capsys.readouterr().out
    with (
        pytest.raises(ValueError, match=r"learning_rate was 0\.25 and is 0\.1"),
        open_run(dataclasses.replace(args, learning_rate=0.1)),
    ):
        pass


def test_an_unknown_tracker_is_refused_with_the_known_ones():
    assert trackers(None) == trackers(["none"]) == "none" and trackers(["all"]) == "all"
    with pytest.raises(ValueError, match=r"report_to wandby: choose from .*wandb"):
        trackers(["wandby"])
