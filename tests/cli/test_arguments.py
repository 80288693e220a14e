import errno
import gc
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from transformers.hf_argparser import HfArg

import hfllm
from hfllm.cli.arguments import parse_arguments, parse_overrides, run, save_arguments, with_dashes


@dataclass
class Arguments:
    dataset: str = HfArg(default="stdlib", help="Text.")
    learning_rate: float = HfArg(default=1e-3, help="Rate.")
    max_steps: int | None = HfArg(default=None, help="Steps.")
    use_cache: bool = HfArg(default=True, help="Cache.")
    report_to: list[str] | None = HfArg(default=None, help="Trackers.")
    config: str | None = HfArg(default=None, help="YAML.")


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_yaml_and_yaml_over_the_defaults(tmp_path):
    config = write(tmp_path / "a.yaml", "learning_rate: 0.5\nmax_steps: 7\n")
    parsed = parse_arguments(Arguments, ["--config", config, "--max_steps", "9"])
    assert (parsed.dataset, parsed.learning_rate, parsed.max_steps) == ("stdlib", 0.5, 9)
    assert parse_arguments(Arguments, ["--max_steps=9", f"--config={config}"]).max_steps == 9


def test_yaml_values_get_the_types_of_the_command_line(tmp_path):
    config = write(tmp_path / "a.yaml", "learning_rate: 2e-4\nuse_cache: false\nreport_to: [a, b]\nmax_steps: null\n")
    parsed = parse_arguments(Arguments, ["--config", config])
    assert parsed.learning_rate == 2e-4  # YAML itself reads 2e-4 as a string
    assert parsed.use_cache is False
    assert parsed.report_to == ["a", "b"]
    assert parsed.max_steps is None


def test_a_value_that_begins_with_a_dash_is_a_value(tmp_path):
    config = write(tmp_path / "a.yaml", "dataset: --odd\nlearning_rate: -1\n")
    parsed = parse_arguments(Arguments, ["--config", config])
    assert (parsed.dataset, parsed.learning_rate) == ("--odd", -1.0)


@pytest.mark.parametrize(
    ("argv", "yaml_text", "message"),
    [
        (["--learnin_rate", "1"], "", "unknown argument '--learnin_rate'; did you mean 'learning_rate'?"),
        (["--max-step=3"], "", "unknown argument '--max-step=3'; did you mean 'max_steps'?"),
        (["stray"], "", "unknown argument 'stray'"),
        (["--mixed_precision", "bf16"], "", "it is for the launcher, as in `accelerate launch --mixed_precision ..."),
        (["--bf16"], "", "precision is for the launcher, as in `accelerate launch --mixed_precision bf16 ...`"),
        (["--max_steps", "many"], "", "argument --max_steps: invalid int value: 'many'"),
        ([], "max_stepz: 3", "unknown option 'max_stepz' in {config}; did you mean 'max_steps'?"),
        ([], "max_steps: {a: 1}", "option 'max_steps' in {config} is a mapping"),
        ([], "- max_steps", "must hold `option: value` lines, but holds a list"),
        ([], "max_steps: [", "is not YAML"),
        ([], "max_steps: 3\nseed: 1\nmax-steps: 4", "{config} has 'max_steps' more than once. Leave one of them."),
    ],
)
def test_errors_name_the_nearest_known_option(tmp_path, capsys, argv, yaml_text, message):
    config = write(tmp_path / "a.yaml", yaml_text)
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Arguments, ["--config", config, *argv])
    assert stopped.value.code == 2
    assert message.format(config=config) in capsys.readouterr().err


def test_other_spellings_of_an_option_are_taken_as_before():
    for argv in (["--max-steps", "3"], ["--max_steps=3"], ["--max-steps=3"]):
        assert parse_arguments(Arguments, argv).max_steps == 3
    for argv in (["--no_use_cache"], ["--no-use-cache"], ["--use-cache", "false"], ["--use_cache=no"]):
        assert parse_arguments(Arguments, argv).use_cache is False
    assert parse_arguments(Arguments, ["--use_cache"]).use_cache is True


NAMES = ["block_size", "stride", "output_dir", "overwrite_output_dir", "text_column", "model", "reports"]


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("block_size=512 is longer than 256.", "--block_size 512 is longer than 256."),
        ("stride=4: give another `stride`.", "--stride 4: give another --stride."),
        ("The stride is too long for the model.", "The stride is too long for the model."),
        ("Choose another output_dir.", "Choose another --output_dir."),
        ("overwrite_output_dir starts again", "--overwrite_output_dir starts again"),
        ("start from `model=out/run`, or (block_size=3)", "start from --model out/run, or (--block_size 3)"),
        ("text_column='id;text'", "--text_column 'id;text'"),
        ("Give --block_size 3.", "Give --block_size 3."),
        ("out/output_dir/x, config.block_size, my_block_size", "out/output_dir/x, config.block_size, my_block_size"),
        ("columns ['text_column', 'x'] and block_size(3)", "columns ['text_column', 'x'] and block_size(3)"),
        ("hidden_size=3 is no option of this recipe", "hidden_size=3 is no option of this recipe"),
    ],
)
def test_the_librarys_parameters_are_printed_as_options(message, printed):
    assert with_dashes(message, NAMES) == printed


def test_an_error_of_the_library_speaks_of_the_recipes_options(monkeypatch, capsys):
    from hfllm.cli.opening import open_config

    monkeypatch.setattr("sys.argv", ["recipe"])

    @dataclass
    class WithModel:
        model: str = "x"

    with pytest.raises(SystemExit):
        run(lambda arguments: open_config(str(Path(__file__).parent)), WithModel)
    assert f"error: --model {Path(__file__).parent} is a folder without a config.json" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "number"), [(b"max_steps: \xe9", 12), ("max_steps: 3".encode("utf-16"), 1)])
def test_a_yaml_file_that_is_not_utf8_is_an_error_in_words(content, number, tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--config", str(tmp_path / "a.yaml")])
    assert f"a.yaml is not UTF-8: byte {number} is wrong" in capsys.readouterr().err


def test_a_missing_yaml_file_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--config", "nowhere.yaml"])
    assert "nowhere.yaml: No such file or directory" in capsys.readouterr().err


def test_an_abbreviation_is_not_guessed(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--data", "x"])
    assert "unknown argument '--data'; did you mean 'dataset'?" in capsys.readouterr().err


def test_saved_arguments_are_read_back(tmp_path):
    arguments = Arguments(learning_rate=1e-5, report_to=["tensorboard"], config="old.yaml")
    save_arguments(arguments, tmp_path / "arguments.yaml")
    assert "config" not in yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    again = parse_arguments(Arguments, ["--config", str(tmp_path / "arguments.yaml")])
    assert (again.learning_rate, again.report_to, again.max_steps) == (1e-5, ["tensorboard"], None)


def test_overrides_get_yaml_types_and_known_names():
    known = ["attention_bias", "norm_eps", "hidden_act", "head_dim"]
    pairs = ["attention_bias=false", "norm_eps=1e-5", "hidden_act=silu", "head_dim=64"]
    expected = {"attention_bias": False, "norm_eps": 1e-5, "hidden_act": "silu", "head_dim": 64}
    assert parse_overrides(pairs, known) == expected
    with pytest.raises(ValueError, match="'norm_epz=1' is not `field=value` of a known field; did you mean 'norm_eps'"):
        parse_overrides(["norm_epz=1"], known)
    with pytest.raises(ValueError, match="'head_dim' is not `field=value`"):
        parse_overrides(["head_dim"], known)


def test_our_checks_end_in_one_message_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    from hfllm.data import load_corpus

    monkeypatch.setattr("sys.argv", ["recipe"])
    with pytest.raises(SystemExit) as stopped:
        run(lambda arguments: load_corpus("./nowhere.txt"), Arguments)
    assert stopped.value.code == 2
    assert "error: " in (message := capsys.readouterr().err) and "nowhere.txt" in message
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda arguments: int("bug"), Arguments)


def test_what_a_recipe_imported_is_not_searched_for_garbage_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe"])
    kept = gc.get_freeze_count()
    seen = []
    try:
        run(lambda arguments: seen.extend((gc.isenabled(), gc.get_freeze_count() > kept)), Arguments)
    finally:
        gc.unfreeze()
    assert seen == [True, True]


@pytest.mark.parametrize("is_collecting", [True, False])
def test_importing_hfllm_leaves_the_garbage_collector_as_it_was(is_collecting):
    try:
        (gc.enable if is_collecting else gc.disable)()
        importlib.reload(hfllm)
        assert gc.isenabled() is is_collecting
    finally:
        gc.enable()


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda folder: (folder / "file" / "below").mkdir(), "file/below: Not a directory."),
        (
            lambda folder: fail(OSError(errno.ENOSPC, "No space left on device")),
            "No space left on device. Free disk space, and start",
        ),
        (
            lambda folder: fail(SafetensorError("Error while serializing: I/O error: ... (os error 28)")),
            "No space left on device. Free disk space, and start",
        ),
    ],
    ids=["a folder that cannot be made", "a full disk", "a full disk for safetensors"],
)
def test_errors_of_the_system_about_a_file_are_shown_without_a_traceback(tmp_path, monkeypatch, capsys, fails, message):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["recipe"])
    with pytest.raises(SystemExit) as stopped:
        run(lambda arguments: fails(tmp_path), Arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_program_without_a_word():
    program = (
        "import dataclasses, sys; from hfllm.cli.arguments import run\n"
        "@dataclasses.dataclass\nclass Arguments:\n    config: str | None = None\n"
        "run(lambda arguments: [print('x' * 1000, flush=True) for _ in range(1000)], Arguments)"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    process.stdout.readline()
    process.stdout.close()
    assert "Error" not in process.stderr.read().decode()
    assert process.wait() == 141


def test_a_wrong_option_is_not_hidden_behind_a_list_of_all(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--learnin_rate", "1"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "?. " not in lines[1]


def test_ctrl_c_prints_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe"])

    with pytest.raises(SystemExit) as stopped:
        run(lambda arguments: fail(KeyboardInterrupt()), Arguments)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("\nInterrupted. The same command starts again")


@pytest.mark.slow
def test_under_accelerates_launcher_a_wrong_option_ends_in_our_message():
    recipes = Path(__file__).parents[2] / "recipes"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    command += [str(recipes / "pretrain.py"), "--block_sise", "64"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=recipes.parent)
    assert finished.returncode != 0
    last = finished.stderr.splitlines()[-1]
    assert "error: unknown argument '--block_sise'; did you mean 'block_size'? --help lists them all." in last
