"""`recipes/pretrain.py --prepare_only`: rows made in advance, and runs on them."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hfllm.runs.log import read_log
from tests.distributed.launching import ROOT, command, environment, run
from tests.recipes.conftest import make_sentences


def numbers_of(output_dir) -> list[dict]:
    """The log without what the clock decides."""
    entries = read_log(output_dir / "log.jsonl")
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in entries]


@pytest.fixture
def rows(run_pretrain, small, tmp_path, text_file):
    """Prepared rows of the text of `small`, and options of a run on them, which names no text."""
    names = ("dataset", "tokenizer", "cache_dir", "validation_fraction", "block_size")
    text = {name: small[name] for name in names}
    run_pretrain(prepare_only=True, output_dir=tmp_path / "rows", **text)
    return {**small, "dataset": tmp_path / "rows", "tokenizer": tmp_path / "rows" / "tokenizer"}


def test_a_run_on_prepared_rows_is_the_run_on_their_text_to_the_last_digit(run_pretrain, small, rows, tmp_path):
    from_rows = run_pretrain(**{**rows, "output_dir": tmp_path / "from-rows", "cache_dir": tmp_path / "unused"})
    from_text = run_pretrain(**{**small, "output_dir": tmp_path / "from-text"})
    assert numbers_of(tmp_path / "from-rows") == numbers_of(tmp_path / "from-text")
    for name in ("corpus_sha256", "tokenizer_sha256", "eval_loss", "eval_bits_per_byte", "eval_bytes", "eval_tokens"):
        assert from_rows[name] == from_text[name]
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("from-rows", "from-text")]
    assert records[0]["identity"] == records[1]["identity"]


def test_a_run_begun_on_text_resumes_on_the_rows(run_pretrain, small, rows):
    schedule = {"lr_scheduler_type": "constant"}
    run_pretrain(**{**small, **schedule, "max_steps": 6})
    assert run_pretrain(**{**rows, **schedule, "max_steps": 8})["train_steps"] == 8


def test_what_is_printed_says_where_the_rows_are_and_what_to_type_next(run_pretrain, small, tmp_path, capsys):
    names = ("dataset", "tokenizer", "cache_dir", "block_size", "validation_fraction")
    text = {name: small[name] for name in names}
    run_pretrain(prepare_only=True, output_dir=tmp_path / "rows", **text)
    printed = capsys.readouterr().out
    assert "Encoded 2 shards: " in printed and " MB/s" in printed
    next_command = f"recipes/pretrain.py --dataset {tmp_path}/rows --tokenizer {tmp_path}/rows/tokenizer"
    assert f"{next_command} --block_size 32 --validation_fraction 0.2\n" in printed
    assert f"hf upload me/rows {tmp_path}/rows --repo-type dataset" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "rows"]  # no run's folder


def test_a_part_says_which_shards_are_missing_and_the_command_that_makes_them(run_pretrain, small, tmp_path, capsys):
    text = {name: small[name] for name in ("dataset", "tokenizer", "cache_dir", "block_size", "validation_fraction")}
    run_pretrain(prepare_only=True, prepare_part="1/2", output_dir=tmp_path / "rows", **text)
    printed = capsys.readouterr().out
    [words] = [line.split() for line in printed.splitlines() if "train-00000" in line]
    assert words[1:4] == ["python", "recipes/pretrain.py", "--prepare_only"] and words[-2:] == ["--prepare_part", "0/2"]
    assert words[words.index("--block_size") + 1] == "32" and "--hidden_size" not in words
    assert not (tmp_path / "rows" / "rows.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prepare_only": True, "streaming": True, "max_steps": 1}, "--prepare_only .* goes not with --streaming"),
        ({"prepare_only": True, "dry_run": True}, "--prepare_only .* goes not with --dry_run"),
        ({"prepare_only": True, "push_to_hub": True}, "The command that pushes rows is printed at the end"),
        ({"prepare_only": True, "overwrite_output_dir": True}, "Delete the folder yourself"),
        ({"prepare_part": "0/2"}, "--prepare_part 0/2 is for --prepare_only"),
        *(
            ({"prepare_only": True, "prepare_part": part}, rf"--prepare_part {part}: give the part and the number")
            for part in ("2/2", "1", "a/b", "0/0")
        ),
    ],
)
def test_options_that_do_not_go_with_preparing_are_refused(run_pretrain, options, message):
    args = run_pretrain.recipe.PretrainArguments(**options)
    args.resolve()
    with pytest.raises(ValueError, match=message):
        args.check()


def test_rows_are_written_to_a_folder_of_their_own_by_default(run_pretrain):
    for is_preparing, folder in ((True, "out/rows"), (False, "out/pretrain")):
        args = run_pretrain.recipe.PretrainArguments(prepare_only=is_preparing)
        args.resolve()
        assert args.output_dir == folder


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer_folder) -> dict[str, object]:
    """Options for a text of several shards."""
    folder = tmp_path_factory.mktemp("large")
    sentences = make_sentences(30_000)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    own = {"dataset": folder / "text.jsonl", "cache_dir": folder / "cache", "tokenizer": tokenizer_folder}
    return {**own, "block_size": 64, "prepare_only": True}


def words_of(options: dict[str, object]) -> list[str]:
    return ["recipes/pretrain.py", *(f"--{name}={value}" for name, value in options.items())]


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory) -> dict[str, bytes]:
    """The files that one process makes."""
    folder = tmp_path_factory.mktemp("whole") / "rows"
    finished = run([sys.executable, *words_of({**large, "output_dir": folder})])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return contents(folder)


@pytest.mark.slow
@pytest.mark.fault(1)
def test_preparing_that_is_killed_leaves_no_process_and_continues_to_the_same_files(large, whole, tmp_path):
    """kill -9 of the main process alone: those that encode for it end by themselves."""
    words = [sys.executable, *words_of({**large, "output_dir": tmp_path / "rows"})]
    shards = tmp_path / "rows" / "encoded"
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(shards.glob("train-*/account.json")):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("train-*/data.arrow")}
    assert kept
    finished = run([*words, "--prepare_part=0/1"])
    assert finished.returncode == 0 and "of them before" in finished.stdout, finished.stdout + finished.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run(words).returncode == 0
    assert contents(tmp_path / "rows") == whole


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_of_accelerate_make_the_same_files(large, whole, tmp_path, num_processes):
    launch = command("multi_cpu.yaml", num_processes)
    finished = run([*launch, *words_of({**large, "output_dir": tmp_path / "rows"})])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("Encoded ") == 1
    assert contents(tmp_path / "rows") == whole


@pytest.mark.slow
def test_tasks_of_an_array_make_the_same_files(large, whole, tmp_path):
    """Several at the same time, as Slurm starts them: --prepare_part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."""
    words = [sys.executable, *words_of({**large, "output_dir": tmp_path / "rows"})]
    tasks = [subprocess.Popen([*words, f"--prepare_part={n}/3"], cwd=ROOT, env=environment()) for n in range(3)]
    assert [task.wait(timeout=200) for task in tasks] == [0, 0, 0]
    assert run(words).returncode == 0
    assert contents(tmp_path / "rows") == whole


WAIT = """
import datetime, sys, time
sys.path.insert(0, ".")
from hfllm.training import devices
devices.TIMEOUT = datetime.timedelta(seconds=4)
from hfllm.data.training_text import main_process_first
accelerator = devices.start_accelerator()
with main_process_first(accelerator):
    if accelerator.is_main_process:
        time.sleep(10)
    print("went on", accelerator.process_index, flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_wait_for_the_main_one_longer_than_their_timeout(tmp_path):
    (tmp_path / "wait.py").write_text(WAIT)
    finished = run([*command("multi_cpu.yaml", 2), str(tmp_path / "wait.py")])
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stdout.splitlines() if line.startswith("went on")] == ["went on 0", "went on 1"]
