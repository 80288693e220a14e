import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

import hfllm
from hfllm.conversion import to_native
from hfllm.conversion.folder import new_folder, save_model
from tests.conftest import make_tiny_config
from tests.conversion.test_native import LLAMA_3_SCALING, llama, qwen3


def write_model(folder):
    (folder / "config.json").write_text("{}")


def test_the_folder_appears_whole_at_the_end(tmp_path):
    target = tmp_path / "some" / "where" / "model"
    with new_folder(target) as folder:
        write_model(folder)
        assert not target.exists()
        assert folder.parent == target.parent  # on the same disk, so that renaming copies nothing
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_after_an_error_nothing_is_left(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "model") as folder:
        write_model(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_and_one_with_something_in_it_is_not(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with new_folder(target) as folder:
        write_model(folder)
    with pytest.raises(ValueError, match=r"is not empty; it holds config\.json.*overwrite_output_dir"):
        new_folder(target).__enter__()
    with pytest.raises(ValueError, match="is a file"):
        new_folder(target / "config.json").__enter__()


def test_overwriting_replaces_an_export_as_a_whole_and_only_when_the_new_one_is_done(tmp_path):
    target = tmp_path / "model"
    with new_folder(target) as folder:
        write_model(folder)
        (folder / "old.txt").touch()
    with pytest.raises(ValueError, match="wrong"), new_folder(target, overwrite=True) as folder:
        raise ValueError("wrong")
    assert (target / "old.txt").exists()
    with new_folder(target, overwrite=True) as folder:
        (folder / "model.gguf").touch()
    assert [path.name for path in target.iterdir()] == ["model.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwriting_never_deletes_what_is_no_export(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_model(run)
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "to_mother.txt").touch()
    for target in (run, letters):
        with pytest.raises(ValueError, match="is no earlier export"):
            new_folder(target, overwrite=True).__enter__()
    assert (run / "checkpoints").exists() and (letters / "to_mother.txt").exists()


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    with new_folder(tmp_path / "model") as folder:
        write_model(folder)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/model could not be written, and nothing of it is left: .*Not a directory"):
        new_folder(tmp_path / "file" / "model").__enter__()
    with (
        pytest.raises(OSError, match=r"could not be written, and nothing of it is left: .*No space left"),
        new_folder(tmp_path / "model"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not shutil.which("mount") or sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_runs_full_while_weights_are_written_is_said_and_left_clean(tmp_path, tokenizer):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        model = to_native(hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=12_000)))
        with (
            pytest.raises(OSError, match="disk/model could not be written, and nothing of it is left"),
            new_folder(disk / "model") as folder,
        ):
            save_model(model, tokenizer, folder)
        assert list(disk.iterdir()) == []
        with pytest.raises(ValueError, match="where a disk is mounted"):
            new_folder(disk).__enter__()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def tokenizer():
    return hfllm.train_bpe(["the cat sees a dog. a dog hears the cat\n"] * 20, 300)


def test_a_saved_folder_opens_with_the_auto_classes_and_holds_no_code(tokenizer, tmp_path):
    model = to_native(hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=300)))
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    save_model(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Qwen3ForCausalLM
    assert loaded.generation_config.temperature == 0.5
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in (tmp_path / "config.json").read_text()


def test_programs_on_transformers_4_find_the_names_they_know(tokenizer, tmp_path):
    """What 4.57 reads: it fails on the class `TokenizersBackend` and a list of `extra_special_tokens`, and takes a rope
    scaling only from `rope_scaling`, its base only from `rope_theta`."""
    model = LlamaForCausalLM(llama(rope_parameters=LLAMA_3_SCALING)).eval()
    loaded_once = tmp_path / "tokenizer"
    tokenizer.save_pretrained(loaded_once)
    save_model(model, AutoTokenizer.from_pretrained(loaded_once), tmp_path)
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & tokenizer_config.keys()

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in LLAMA_3_SCALING.items() if key != "rope_theta"}
    # ... and today's transformers reads the same model.
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == LLAMA_3_SCALING
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_without_a_scaling_only_the_base_is_repeated(tokenizer, tmp_path):
    save_model(Qwen3ForCausalLM(qwen3()), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and "rope_scaling" not in config


def test_all_files_have_the_same_permissions(tokenizer, tmp_path):
    """safetensors keeps its files to their owner, but a server often runs as somebody else."""
    save_model(Qwen3ForCausalLM(qwen3()), tokenizer, tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
