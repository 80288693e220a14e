import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hfllm.runs.folder import claim_folder


def make(folder: Path, *names: str, text: str = "theirs") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def files_in(folder: Path) -> set[str]:
    """The paths of all files; a link counts as one."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


IDENTITY = {"learning_rate": 0.1, "train_sha256": "a" * 64}
CHECKPOINT = [f"checkpoints/step-00000006/{name}" for name in ("model.safetensors", "state.json", "manifest.json")]


def run(
    folder: Path, *, identity=IDENTITY, step=6, files=("metrics.json", "model.safetensors"), **options
) -> list[str]:
    """A whole run in a few lines: it writes a log, a checkpoint and its result."""
    with claim_folder(folder, recipe="pretrain", **options) as claimed:
        changes = claimed.begin(identity, files=["log.jsonl"])
        if not claimed.is_finished(step=step):
            make(claimed.path, "log.jsonl", *CHECKPOINT, text="ours")
            with claimed.writing() as partial:
                make(partial, "config.json", *files, text="ours")
            claimed.finish(step=step)
    return changes


RUN = {"run.json", "log.jsonl", "config.json", "metrics.json", "model.safetensors", *CHECKPOINT}


# Beginning and resuming


def test_a_run_leaves_its_files_and_a_record_of_them(tmp_path):
    run(tmp_path / "out")
    assert files_in(tmp_path / "out") == RUN
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["files"] == ["config.json", "log.jsonl", "metrics.json", "model.safetensors"]
    assert record["identity"] == IDENTITY and record["finished"]["step"] == 6


@pytest.mark.fault(19, 26)
def test_another_run_is_refused_with_the_difference_and_changes_nothing(tmp_path):
    run(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    with pytest.raises(ValueError, match=r"belongs to another run:\n    train_sha256 was aaaa.* and is bbbb"):
        run(tmp_path, identity={**IDENTITY, "train_sha256": "b" * 64})
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == before


@pytest.mark.fault(19)
def test_a_refusal_names_a_checkpoint_to_start_another_run_from(tmp_path):
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.begin(IDENTITY)
    make(tmp_path / "checkpoints", *(f"{name}/state.json" for name in ("step-00000009", "step-00000010.broken")))
    with pytest.raises(ValueError, match=r"model=.*/checkpoints/step-00000009 and another output_dir"):
        run(tmp_path, identity={"learning_rate": 0.2})


def test_a_run_that_was_killed_while_it_filled_its_cache_within_its_folder_begins(tmp_path):
    make(tmp_path / "out", "cache/rows-1/data.arrow")
    with pytest.raises(ValueError, match="holds files that no run made"):
        run(tmp_path / "out")
    with pytest.raises(ValueError, match="holds files that no run made"):
        run(tmp_path / "out", cache_dir=tmp_path / "out")
    run(tmp_path / "out", cache_dir=tmp_path / "out" / "cache")
    assert (tmp_path / "out" / "cache" / "rows-1" / "data.arrow").exists()
    make(tmp_path / "other", "cache/data.arrow", "cached.txt")
    with pytest.raises(ValueError, match=r"a run could overwrite them: cached\.txt"):
        run(tmp_path / "other", cache_dir=tmp_path / "other" / "cache")


def test_a_run_that_ended_before_its_first_checkpoint_is_replaced_by_any_other(tmp_path):
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.begin(IDENTITY, files=["log.jsonl"])
        make(tmp_path, "log.jsonl", "notes.txt")
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.begin({"learning_rate": 0.2})
    assert files_in(tmp_path) == {"run.json", "notes.txt"}


def test_an_option_that_may_change_is_applied_and_reported(tmp_path):
    def start(**options) -> list[str]:
        with claim_folder(tmp_path, recipe="pretrain") as folder:
            return folder.begin(IDENTITY, options=options)

    assert start(save_steps=200, logging_steps=10) == []
    make(tmp_path, *CHECKPOINT)
    assert start(save_steps=50, logging_steps=10) == ["save_steps was 200 and is 50"]
    assert start(save_steps=50, logging_steps=10, eval_steps=5) == []  # a new version has one option more


def test_a_folder_of_another_recipe_is_refused_even_to_overwrite(tmp_path):
    run(tmp_path)
    for overwrite in (False, True):
        with (
            pytest.raises(ValueError, match="belongs to a run of another recipe, pretrain"),
            claim_folder(tmp_path, recipe="export", overwrite=overwrite),
        ):
            pass
    assert files_in(tmp_path) == RUN


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}'])
def test_a_record_that_cannot_be_read_is_reported(tmp_path, text):
    make(tmp_path, "run.json", text=text)
    with pytest.raises(ValueError, match=r"run.json cannot be read .*Delete it"):
        run(tmp_path, overwrite=True)


def test_an_empty_path_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, "checkpoints/step-00000006/state.json"))
    with pytest.raises(ValueError, match="output_dir is empty"), claim_folder("", recipe="pretrain", overwrite=True):
        pass
    assert files_in(tmp_path) == {"checkpoints/step-00000006/state.json"}


def test_only_looking_writes_and_locks_nothing(tmp_path):
    with claim_folder(tmp_path / "new", recipe="pretrain", only_look=True):
        assert not (tmp_path / "new").exists()


# Results


@pytest.mark.fault(23)
def test_results_are_moved_in_when_they_are_whole(tmp_path):
    run(tmp_path)
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.begin(IDENTITY)
        with pytest.raises(OSError, match="full"), folder.writing() as partial:
            make(partial, "model.safetensors", text="half of the n")
            raise OSError("the disk is full")
        assert (tmp_path / "model.safetensors").read_text() == "ours"
        with folder.writing() as partial:
            make(partial, "model.safetensors", "adapter/adapter_model.safetensors", text="new")
    assert (tmp_path / "model.safetensors").read_text() == "new"
    assert files_in(tmp_path) == {*RUN, "adapter/adapter_model.safetensors"}
    assert not (tmp_path / ".partial").exists()


def test_weights_of_another_form_give_way(tmp_path):
    """Or `from_pretrained` would find the old ones beside the new ones."""
    run(tmp_path)
    make(tmp_path, "model-theirs.safetensors")
    with claim_folder(tmp_path, recipe="pretrain") as folder, folder.writing() as partial:
        make(partial, "model-00001-of-00001.safetensors", "model.safetensors.index.json", text="new")
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "model-theirs.safetensors",
    }
    assert files_in(tmp_path) > set(CHECKPOINT)


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    make(tmp_path, ".partial/model.safetensors", f".run.json.{'a1' * 16}.tmp", text="half")
    make(tmp_path, ".mine.tmp")
    run(tmp_path)
    assert files_in(tmp_path) == {*RUN, ".mine.tmp"}


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(6, 24)
def test_a_disk_that_is_really_full_loses_the_new_result_only(small_disk):
    folder = small_disk / "out"
    run(folder)
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    with claim_folder(folder, recipe="pretrain") as claimed:
        with pytest.raises(OSError, match="No space left"), claimed.writing() as partial:
            (partial / "model.safetensors").write_bytes(bytes(2**21))
        assert {name: (folder / name).read_bytes() for name in before} == before
    run(folder)
    assert files_in(folder) == RUN


# Being finished


@pytest.mark.fault(20, 23)
def test_a_run_is_finished_when_its_result_is_there_as_it_was_written(tmp_path):
    def is_finished(step=6) -> bool:
        with claim_folder(tmp_path, recipe="pretrain") as folder:
            return folder.is_finished(step=step)

    run(tmp_path)
    assert is_finished()
    assert not is_finished(step=12)  # it is to be longer
    (tmp_path / "metrics.json").write_text("numbers of an evaluation were added")
    assert is_finished()
    (tmp_path / "metrics.json").unlink()
    assert not is_finished()
    run(tmp_path)
    (tmp_path / "model.safetensors").write_text("oubs")  # a flipped bit
    assert not is_finished()
    run(tmp_path)
    assert is_finished()
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.reopen()
    assert not is_finished()


@pytest.mark.fault(3, 23)
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "model.safetensors"])
def test_a_model_that_does_not_open_any_more_is_not_finished(tmp_path, name):
    """The tokenizer is written before the weights are."""
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        folder.begin(IDENTITY)
        for files in (
            ("tokenizer.json", "arguments.yaml"),
            ("model.safetensors", "config.json", "generation_config.json", "metrics.json"),
        ):
            with folder.writing() as partial:
                make(partial, *files)
        folder.finish(step=6)
    (tmp_path / "arguments.yaml").unlink()
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        assert folder.is_finished(step=6)
    (tmp_path / name).unlink()
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        assert folder.find_fault(step=6) == f"{name} is missing"


def test_what_may_fail_after_the_result_is_noted_apart(tmp_path):
    run(tmp_path)
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        assert not folder.is_done("push")
        folder.note_done(page=True, push="https://hub/commit/1")
    with claim_folder(tmp_path, recipe="pretrain") as folder:
        assert folder.is_done("page") and folder.is_done("push") and folder.is_finished(step=6)
        assert not folder.is_done("page", file="report.html")
        (tmp_path / "report.html").write_text("page")
        assert folder.is_done("page", file="report.html")
        folder.finish(step=12, files=["config.json"])
        assert not folder.is_done("push")  # of the earlier model


# Overwriting


@pytest.mark.fault(32)
def test_overwriting_deletes_the_runs_own_files_and_nothing_else(tmp_path):
    run(tmp_path)
    foreign = {"thesis.docx", "checkpoints/other_tool.pt", "checkpoints/step-00000006/notes.txt", "README.md"}
    foreign |= {"checkpoints/step-final/model.safetensors", "old/model.safetensors", "adapter/notes.txt"}
    make(tmp_path, *foreign)
    with claim_folder(tmp_path, recipe="pretrain", overwrite=True) as folder:
        folder.begin({"learning_rate": 0.5})
    moved = "checkpoints/kept-step-00000006/notes.txt"
    assert files_in(tmp_path) == {"run.json", moved, *foreign - {"checkpoints/step-00000006/notes.txt"}}


@pytest.mark.fault(32)
def test_checkpoints_that_were_set_aside_or_half_written_are_the_runs_own(tmp_path):
    run(tmp_path)
    torn = "step-00000003.tmp step-00000003.broken-2 checkpoint-5 broken-checkpoint-5-2 deleting-checkpoint-4"
    for name in (*torn.split(), "writing/checkpoint-7"):
        make(tmp_path / "checkpoints" / name, "model.safetensors", "trainer_state.json")
        make(tmp_path / "checkpoints" / name, "shards/0.distcp", "mine.txt")
        listed = {"files": {"shards/0.distcp": {}}}
        (tmp_path / "checkpoints" / name / "manifest.json").write_text(json.dumps(listed))
    (tmp_path / "checkpoints" / "step-00000009.tmp").mkdir()
    with claim_folder(tmp_path, recipe="pretrain", overwrite=True) as folder:
        folder.begin(IDENTITY)
    left = files_in(tmp_path) - {"run.json"}
    assert len(left) == 6 and {Path(name).name for name in left} == {"mine.txt"}
    assert {Path(name).parent.name.split("-")[0] for name in left} == {"kept"}
    assert not (tmp_path / "checkpoints" / "step-00000009.tmp").exists()


@pytest.mark.fault(32)
def test_nothing_is_deleted_before_the_run_begins(tmp_path):
    run(tmp_path)
    with pytest.raises(KeyError), claim_folder(tmp_path, recipe="pretrain", overwrite=True):
        raise KeyError("there is no such column")
    assert files_in(tmp_path) == RUN
    run(tmp_path)  # and it is still the run that it was


@pytest.mark.fault(32)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_is_refused(tmp_path, overwrite):
    foreign = {"checkpoints/other_tool.pt", "samples.txt", "config.json", "thesis.docx"}
    make(tmp_path, *foreign)
    with pytest.raises(ValueError, match=r"holds files that no run made, .*config.json.*a model that no run of this"):
        run(tmp_path, overwrite=overwrite)
    assert files_in(tmp_path) == foreign


@pytest.mark.fault(32)
def test_beside_files_whose_names_no_run_uses_one_begins_if_it_is_asked_to(tmp_path):
    make(tmp_path, "thesis.docx", "checkpoints/other_tool.pt")
    with pytest.raises(ValueError, match="holds files that no run made"):
        run(tmp_path)
    run(tmp_path, overwrite=True)
    run(tmp_path, overwrite=True)
    assert files_in(tmp_path) == {*RUN, "thesis.docx", "checkpoints/other_tool.pt"}


def test_hidden_files_and_those_of_a_disk_are_not_an_obstacle(tmp_path):
    make(tmp_path, ".DS_Store", ".gitkeep")
    (tmp_path / "lost+found").mkdir()
    run(tmp_path)


@pytest.mark.fault(32)
@pytest.mark.parametrize("is_run", [True, False])
def test_nothing_is_followed_out_of_the_folder(tmp_path, is_run):
    elsewhere = make(tmp_path / "elsewhere", *(Path(name).relative_to("checkpoints").as_posix() for name in CHECKPOINT))
    before = files_in(elsewhere)
    folder = tmp_path / "out"
    if is_run:
        run(folder)
        for name in CHECKPOINT:
            (folder / name).unlink()
        (folder / "checkpoints" / "step-00000006").rmdir()
        (folder / "checkpoints").rmdir()
    else:
        folder.mkdir()
    (folder / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"checkpoints is a symbolic link to .*elsewhere"):
        run(folder, overwrite=True)
    assert files_in(elsewhere) == before
    if is_run:
        assert (folder / "model.safetensors").exists()


@pytest.mark.fault(32)
def test_a_file_that_is_a_link_is_replaced_and_its_target_stays(tmp_path):
    run(tmp_path / "out")
    make(tmp_path, "theirs")
    for name in ("log.jsonl", "model.safetensors", CHECKPOINT[0]):
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(tmp_path / "theirs")
    run(tmp_path / "out", overwrite=True)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not any((tmp_path / "out" / name).is_symlink() for name in RUN)


@pytest.mark.fault(32)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "place, message",
    [
        ("out", "is model itself"),
        ("out/", "is model itself"),
        ("out/../out", "is model itself"),
        ("link", "is model itself"),
        ("out/checkpoints/step-00000006", "is in output_dir"),
        ("link/checkpoints/step-00000006", "is in output_dir"),
        ("data.txt,out/mine.txt", "is in output_dir"),
    ],
)
def test_a_folder_that_the_run_reads_from_is_not_overwritten(tmp_path, monkeypatch, place, message, overwrite):
    monkeypatch.chdir(tmp_path)
    if overwrite:
        run(Path("out"))
    else:
        make(tmp_path / "out", *CHECKPOINT)
    make(tmp_path, "out/mine.txt", "data.txt")
    Path("link").symlink_to("out")
    before = files_in(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(Path("out"), overwrite=overwrite, inputs={"tokenizer": None, "model": place})
    assert files_in(tmp_path / "out") == before


def test_a_link_in_the_folder_to_a_dataset_elsewhere_is_refused_as_well(tmp_path):
    run(tmp_path / "out")
    make(tmp_path, "my.txt")
    (tmp_path / "out" / "data").symlink_to(tmp_path / "my.txt")
    with pytest.raises(ValueError, match=r"dataset .* is in output_dir"):
        run(tmp_path / "out", overwrite=True, inputs={"dataset": tmp_path / "out" / "data"})


def test_a_run_may_be_below_its_model_and_a_hub_id_is_no_place(tmp_path):
    make(tmp_path / "model", "config.json")
    run(tmp_path / "model" / "tuned", inputs={"model": tmp_path / "model", "dataset": "owner/name"})
    run(tmp_path / "model" / "tuned", inputs={"model": tmp_path / "model"}, overwrite=True)


# Folders of earlier versions


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A run of a version that kept no record."""
    folder = make(tmp_path / "old", "log.jsonl", "samples.txt", "tokenizer.json", "modeling_gpt.py", *CHECKPOINT)
    make(folder, "adapter/adapter_model.safetensors", "thesis.docx")
    options = {"learning_rate": 0.1, "save_steps": 200, "dataset": "my.txt"}
    (folder / "arguments.yaml").write_text(yaml.safe_dump(options))
    return folder


def test_an_earlier_versions_run_resumes_if_its_options_are_the_same(old_run):
    before = files_in(old_run)
    with claim_folder(old_run, recipe="pretrain") as folder:
        with pytest.raises(ValueError, match=r"learning_rate was 0.1 and is 0.2"):
            folder.begin({**IDENTITY, "learning_rate": 0.2})
        assert folder.begin(IDENTITY, options={"save_steps": 100}) == ["save_steps was 200 and is 100"]
    assert files_in(old_run) == {*before, "run.json"}
    with claim_folder(old_run, recipe="pretrain") as folder, pytest.raises(ValueError, match="train_sha256"):
        folder.begin({**IDENTITY, "train_sha256": "b" * 64})


def test_an_earlier_versions_finished_run_is_finished(old_run):
    make(old_run, "config.json")
    make(old_run, "metrics.json", text=json.dumps({"train_steps": 6}))
    with claim_folder(old_run, recipe="pretrain") as folder:
        assert folder.is_finished(step=6) and not folder.is_finished(step=12)
    (old_run / "metrics.json").write_text('{"train_steps"')  # killed while it wrote
    with claim_folder(old_run, recipe="pretrain") as folder:
        assert not folder.is_finished(step=6)


@pytest.mark.fault(32)
def test_of_an_earlier_versions_run_the_files_of_known_names_are_overwritten(old_run):
    with claim_folder(old_run, recipe="pretrain", overwrite=True) as folder:
        folder.begin(IDENTITY)
    assert files_in(old_run) == {"run.json", "thesis.docx"}
