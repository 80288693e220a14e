import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import hfllm
from hfllm.runs import manifest
from hfllm.runs.identity import check_same_run
from hfllm.tokenization import train_bpe
from hfllm.training import checkpoint as checkpoint_module
from hfllm.training.checkpoint import (
    consolidate_checkpoint,
    describe_start,
    find_checkpoint,
    find_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from hfllm.training.optimization import build_adamw
from tests.cutting import cut


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def build(config, seed=0, learning_rate=1e-2):
    torch.manual_seed(seed)
    model = hfllm.GPTForCausalLM(config)
    optimizer = build_adamw(model, learning_rate=learning_rate, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    return model, optimizer


def train(model, optimizer, steps, vocab_size=64):
    for step in steps:
        input_ids = torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def small(step: float = 0.0, size: int = 8):
    """A model whose every weight, and an optimizer whose every average, is the number of the step."""
    model = nn.Linear(size, size)
    optimizer = build_adamw(model, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8)
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
        averages = {name: torch.full_like(parameter, step) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **averages}
    return model, optimizer


def save_small(directory, step, accelerator, **options) -> Path:
    model, optimizer = small(step)
    return save_checkpoint(
        directory, model=model, optimizer=optimizer, state={"step": step}, accelerator=accelerator, **options
    )


def assert_whole(path: Path, accelerator, size: int = 8) -> int:
    """Load it and find in every tensor the step it claims."""
    model, optimizer = small(size=size)
    step = load_checkpoint(path, model=model, optimizer=optimizer, accelerator=accelerator)["step"]
    assert path.name == f"step-{step:08d}"
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert len(values) == 6
    for tensor in [*model.parameters(), *values]:
        assert (tensor == step).all()
    return step


# Saving and resuming


def test_three_steps_saved_and_three_more_are_six_steps_bitwise(tiny_config, tmp_path, accelerator):
    straight = build(tiny_config)
    train(*straight, range(6))

    model, optimizer = build(tiny_config)
    train(model, optimizer, range(3))
    state = {"step": 3, "tokens": 96, "best_loss": 0.1 + 0.2, "text": "naïve"}
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state=state, accelerator=accelerator)
    fresh, fresh_optimizer = build(tiny_config, seed=1, learning_rate=9.0)
    assert load_checkpoint(path, model=fresh, optimizer=fresh_optimizer, accelerator=accelerator) == state
    assert_identical(everything(model, optimizer), everything(fresh, fresh_optimizer))
    assert fresh_optimizer.param_groups[0]["lr"] == 1e-2 and fresh_optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    train(fresh, fresh_optimizer, range(3, 6))
    assert_identical(everything(*straight), everything(fresh, fresh_optimizer))


def test_what_accelerate_prepared_resumes_bitwise_too(tiny_config, tmp_path, accelerator):
    model, optimizer = accelerator.prepare(*build(tiny_config))
    train(model, optimizer, range(2))
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 2}, accelerator=accelerator)
    fresh, fresh_optimizer = accelerator.prepare(*build(tiny_config, seed=1))
    load_checkpoint(path, model=fresh, optimizer=fresh_optimizer, accelerator=accelerator)
    assert_identical(everything(model, optimizer), everything(fresh, fresh_optimizer))


def test_saving_changes_nothing_in_the_running_training(tiny_config, tmp_path, accelerator):
    straight = build(tiny_config)
    train(*straight, range(2))
    model, optimizer = build(tiny_config)
    for step in range(2):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": step}, accelerator=accelerator)
        train(model, optimizer, [step])
    assert_identical(everything(*straight), everything(model, optimizer))


def test_a_checkpoint_before_the_first_step_resumes_bitwise(tiny_config, tmp_path, accelerator):
    straight = build(tiny_config)
    path = save_checkpoint(
        tmp_path, model=straight[0], optimizer=straight[1], state={"step": 0}, accelerator=accelerator
    )
    fresh = build(tiny_config, seed=1)
    load_checkpoint(path, model=fresh[0], optimizer=fresh[1], accelerator=accelerator)
    train(*straight, range(2))
    train(*fresh, range(2))
    assert_identical(everything(*straight), everything(*fresh))


@pytest.mark.fault(21)
def test_the_folder_holds_safetensors_and_json_alone_and_a_tied_weight_once(tiny_config, tmp_path, accelerator):
    model, optimizer = build(tiny_config)
    train(model, optimizer, range(1))
    path = save_checkpoint(
        tmp_path / "checkpoints", model=model, optimizer=optimizer, state={"step": 1}, accelerator=accelerator
    )
    assert path == tmp_path / "checkpoints" / "step-00000001"
    files = {file.name for file in path.iterdir()}
    own = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert own <= files and {Path(name).suffix for name in files - own} == {".json", ".py"}
    assert load_file(path / "model.safetensors").keys() == model.state_dict().keys() - {"lm_head.weight"}
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # so that transformers opens it
    averages = load_file(path / "optimizer.safetensors")
    assert torch.equal(averages["model.embed_tokens.weight.exp_avg"], optimizer.state[model.lm_head.weight]["exp_avg"])


def test_a_checkpoint_opens_as_the_model_of_its_step_with_its_tokenizer(tiny_config, tmp_path, accelerator):
    model, optimizer = build(tiny_config)
    model.generation_config.eos_token_id = [1, 3]
    tokenizer = train_bpe(["a text"], 300)
    parts = {"model": model, "optimizer": optimizer, "tokenizer": tokenizer, "accelerator": accelerator}
    path = save_checkpoint(tmp_path, state={"step": 0}, **parts)
    opened = AutoModelForCausalLM.from_pretrained(path)
    assert type(opened) is hfllm.GPTForCausalLM
    assert opened.generation_config.eos_token_id == [1, 3]
    assert AutoTokenizer.from_pretrained(path)("a text").input_ids == tokenizer("a text").input_ids
    assert_identical(model.state_dict(), opened.state_dict())
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()


def test_a_checkpoint_of_somebody_elses_model_opens_too(tmp_path, accelerator):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters())
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 0}, accelerator=accelerator)
    assert_identical(model.state_dict(), Qwen3ForCausalLM.from_pretrained(path).state_dict())


@pytest.mark.fault(3, 4)
def test_a_damaged_config_or_tokenizer_breaks_a_checkpoint_and_an_older_one_without_them_loads(
    tiny_config, tmp_path, accelerator, caplog
):
    model, optimizer = build(tiny_config)
    parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
    old = save_checkpoint(tmp_path, state={"step": 1}, **parts)
    listed = json.loads((old / "manifest.json").read_text())
    for name in set(listed["files"]) - set(checkpoint_module.FILES):
        (old / name).unlink()
        del listed["files"][name]
    (old / "manifest.json").write_text(json.dumps(listed))
    new = save_checkpoint(tmp_path, state={"step": 2}, **parts)
    flip_a_byte(new / "config.json")
    assert latest_checkpoint(tmp_path) == old
    assert "config.json has changed since it was written" in caplog.text
    assert load_checkpoint(old, model=model, optimizer=optimizer, accelerator=accelerator)["step"] == 1


@pytest.mark.fault(11)
@pytest.mark.parametrize("where", ["weight", "average", "number"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, accelerator, where, value):
    model, optimizer = small(1)
    state = {"step": 1, "evaluation": {"loss": value if where == "number" else 2.0}}
    with torch.no_grad():
        if where == "weight":
            model.weight[3, 5] = value
        elif where == "average":
            optimizer.state[model.bias]["exp_avg_sq"][2] = value
    named = {"weight": "weight", "average": "bias.exp_avg_sq", "number": "state.evaluation.loss"}[where]
    with pytest.raises(FloatingPointError, match=rf"step-00000001 was not written: {named} "):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, state=state, accelerator=accelerator)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["model", "layers"])
def test_a_compiled_model_leaves_the_same_files_and_loads_them(tiny_config, tmp_path, accelerator, what):
    def compiled(model):
        if what == "model":
            return torch.compile(model, backend="eager")
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = torch.compile(layer, backend="eager")
        return model

    paths = []
    for name in ("plain", "compiled"):
        model, optimizer = build(tiny_config)
        train(model, optimizer, range(1))
        model = compiled(model) if name == "compiled" else model
        paths.append(
            save_checkpoint(
                tmp_path / name, model=model, optimizer=optimizer, state={"step": 1}, accelerator=accelerator
            )
        )
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()

    fresh, fresh_optimizer = build(tiny_config, seed=1)
    load_checkpoint(paths[0], model=compiled(fresh), optimizer=fresh_optimizer, accelerator=accelerator)
    for left, right in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert_identical(everything(nn.Module(), optimizer), everything(nn.Module(), fresh_optimizer))


def test_frozen_parameters_and_those_without_a_gradient_yet_resume(tmp_path, accelerator):
    def build_three():
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("used", "unused", "frozen")})
        model["frozen"].weight.requires_grad_(False)
        return model, build_adamw(model, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8)

    model, optimizer = build_three()
    model["used"](torch.ones(2)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 1}, accelerator=accelerator)
    fresh, fresh_optimizer = build_three()
    load_checkpoint(path, model=fresh, optimizer=fresh_optimizer, accelerator=accelerator)
    assert_identical(everything(model, optimizer), everything(fresh, fresh_optimizer))


def test_the_loss_scale_of_float16_is_part_of_it(tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=512.0))
    path = save_small(tmp_path, 1, accelerator)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    assert_whole(path, accelerator)
    assert accelerator.scaler.get_scale() == 512.0


def test_only_the_newest_are_kept_and_the_steps_count_not_the_names(tmp_path, accelerator):
    for step in (7, 99_999_999, 100_000_000):
        save_small(tmp_path, step, accelerator, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    assert latest_checkpoint(tmp_path).name == "step-100000000"


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [{1}, {1, 2}, {1, 3}, {4}, {4, 5}, {4, 6}]),  # the newest one stays as well
        (2, [{1}, {1, 2}, {1, 3}, {3, 4}, {4, 5}, {4, 6}]),
        (3, [{1}, {1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}, {4, 5, 6}]),
        (None, [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}, {1, 2, 3, 4, 5}, {1, 2, 3, 4, 5, 6}]),
    ],
)
def test_the_best_is_among_those_that_are_kept(tmp_path, accelerator, keep, expected):
    for step, best_step, steps in zip((1, 2, 3, 4, 5, 6), (1, 1, 1, 4, 4, 4), expected, strict=True):
        save_small(tmp_path, step, accelerator, keep=keep, best_step=best_step)
        assert {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()} == steps


def test_a_checkpoint_is_found_by_its_step_if_it_is_sound(tmp_path, accelerator, caplog):
    paths = [save_small(tmp_path, step, accelerator) for step in (1, 2)]
    assert [find_checkpoint(tmp_path, step=step) for step in (1, 2, 3)] == [*paths, None]
    content = (paths[0] / "model.safetensors").read_bytes()
    (paths[0] / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_checkpoint(tmp_path, step=1) is None
    assert "model.safetensors has changed since it was written" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-step-00000001", "step-00000002"]


def test_a_step_saved_again_replaces_the_first(tmp_path, accelerator):
    save_small(tmp_path, 1, accelerator)
    model, optimizer = small(1)
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, state={"step": 1, "new": True}, accelerator=accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    state = load_checkpoint(latest_checkpoint(tmp_path), model=model, optimizer=optimizer, accelerator=accelerator)
    assert state["new"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state": {"tokens": 1}}, r"named after its step; .* \['tokens'\]"),
        ({"state": {"step": 1}, "keep": 0}, "keep=0"),
    ],
)
def test_what_makes_no_checkpoint_is_refused(tmp_path, accelerator, options, message):
    model, optimizer = small()
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, accelerator=accelerator, **options)


# Checkpoints that do not fit


@pytest.mark.parametrize(
    "saved, own, message",
    [
        (
            nn.Linear(3, 2),
            nn.Linear(4, 2),
            r"weight is \(2, 3\) float32 in the checkpoint and \(2, 4\) float32 in the model",
        ),
        (nn.Linear(3, 2), nn.Linear(3, 2).bfloat16(), r"weight is .*float32 .* bfloat16 .* \(1 more tensors differ\)"),
        (nn.Linear(3, 2, bias=False), nn.Linear(3, 2), "bias is missing from the checkpoint"),
        (nn.Linear(3, 2), nn.Linear(3, 2, bias=False), "bias is not in the model"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(tmp_path, accelerator, saved, own, message):
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (saved, own)]
    path = save_checkpoint(tmp_path, model=saved, optimizer=optimizers[0], state={"step": 0}, accelerator=accelerator)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model=own, optimizer=optimizers[1], accelerator=accelerator)


@pytest.mark.fault(19)
def test_another_optimizer_or_grouping_is_refused(tmp_path, accelerator):
    path = save_small(tmp_path, 1, accelerator)
    model, _ = small()
    for optimizer, message in [
        (torch.optim.SGD(model.parameters()), "holds the state of AdamW, and the optimizer is SGD"),
        (torch.optim.AdamW(model.parameters()), "bias is in parameter group 1 there and 0 here"),
        (torch.optim.AdamW([model.weight]), "bias is in parameter group 1 there and None here"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model=model, optimizer=optimizer, accelerator=accelerator)


@pytest.mark.fault(19)
def test_a_run_with_other_arguments_is_refused_with_each_difference():
    saved = {"seed": 1, "learning_rate": 1e-3, "dataset": "stdlib"}
    check_same_run(saved, dict(saved), "step-00000001")
    with pytest.raises(ValueError, match="step-00000001 belongs to another run") as error:
        check_same_run(saved, {"seed": 2, "learning_rate": 1e-3, "new_option": "linear"}, "step-00000001")
    assert str(error.value).splitlines()[1:3] == ["    seed was 1 and is 2", "    dataset was 'stdlib' and is None"]
    assert "new_option" not in str(error.value)  # which the version that saved it did not have


# Broken checkpoints


def flip_a_byte(file: Path):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "has changed since it was written": flip_a_byte,
    r"has [1-9][\d,]* bytes instead of": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "has 0 bytes instead of": lambda file: file.write_bytes(b""),
    "is missing": Path.unlink,
}


@pytest.mark.fault(3, 4, 5)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, accelerator, caplog, file, fault):
    for step in (1, 2, 3):
        save_small(tmp_path, step, accelerator)
    DAMAGES[fault](tmp_path / "step-00000003" / file)
    latest = latest_checkpoint(tmp_path)
    assert assert_whole(latest, accelerator) == 2
    assert re.search(f"{file} {fault}", caplog.text)
    assert "broken-step-00000003" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken-step-00000003",
        "step-00000001",
        "step-00000002",
    ]


@pytest.mark.fault(3)
@pytest.mark.parametrize(
    "damage, fault",
    [
        (Path.unlink, "manifest.json is missing"),
        (lambda file: file.write_text(file.read_text()[:50]), "manifest.json cannot be read"),
        (lambda file: file.write_text("[]"), "manifest.json cannot be read"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_manifest_is_named_too(tmp_path, accelerator, caplog, damage, fault):
    for step in (1, 2):
        save_small(tmp_path, step, accelerator)
    damage(tmp_path / "step-00000002" / "manifest.json")
    assert assert_whole(latest_checkpoint(tmp_path), accelerator) == 1
    assert fault in caplog.text


def test_without_verification_only_a_changed_byte_goes_unseen(tmp_path, accelerator):
    for step in (1, 2, 3):
        save_small(tmp_path, step, accelerator)
    flip_a_byte(tmp_path / "step-00000002" / "model.safetensors")
    (tmp_path / "step-00000003" / "optimizer.safetensors").unlink()
    assert latest_checkpoint(tmp_path, verify=False).name == "step-00000002"
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_no_checkpoint_is_none_and_no_sound_one_is_an_error(tmp_path, accelerator, caplog):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert caplog.text == ""
    (save_small(tmp_path, 1, accelerator) / "state.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    assert "No sound checkpoint is left" in caplog.text


def start_small(output_dir, accelerator) -> int:
    """The step from which a run in this folder resumes."""
    model, optimizer = small()
    parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator, "identity": {}}
    return find_state(output_dir, **parts)["step"]


@pytest.mark.fault(1)
def test_a_run_that_was_killed_in_its_first_save_begins_again(tmp_path, accelerator):
    save_small(tmp_path / "checkpoints", 3, accelerator).rename(tmp_path / "checkpoints" / "step-00000003.tmp")
    assert start_small(tmp_path, accelerator) == 0
    assert describe_start(tmp_path) == ""


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", ["broken-step-00000009", "broken-step-00000009-2", "step-00000009.broken"])
def test_a_run_with_broken_checkpoints_alone_does_not_begin_again_by_itself(tmp_path, accelerator, name):
    save_small(tmp_path / "checkpoints", 9, accelerator).rename(tmp_path / "checkpoints" / name)
    with pytest.raises(ValueError, match="only broken ones"):
        start_small(tmp_path, accelerator)
    save_small(tmp_path / "checkpoints", 2, accelerator)
    assert start_small(tmp_path, accelerator) == 2
    assert describe_start(tmp_path).endswith("resume from step-00000002.\n")


def test_a_step_that_breaks_twice_is_set_aside_twice(tmp_path, accelerator):
    for _ in range(2):
        (save_small(tmp_path, 1, accelerator) / "state.json").unlink()
        latest_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-step-00000001", "broken-step-00000001-2"]


def test_a_checkpoint_of_a_newer_format_is_left_where_it_is(tmp_path, accelerator):
    listed = save_small(tmp_path, 1, accelerator) / "manifest.json"
    listed.write_text(listed.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"written by a newer hfllm .format 2"):
        latest_checkpoint(tmp_path)
    assert listed.exists()


def test_loading_a_broken_one_by_name_is_refused(tmp_path, accelerator):
    path = save_small(tmp_path, 1, accelerator)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is broken: optimizer.safetensors is missing"):
        assert_whole(path, accelerator)


# Checkpoints in pieces


def test_one_process_resumes_from_pieces_bitwise(tiny_config, tmp_path, accelerator):
    model, optimizer = build(tiny_config)
    train(model, optimizer, range(2))
    state = {"step": 2}
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state=state, accelerator=accelerator)
    cut(path, 3)
    fresh, fresh_optimizer = build(tiny_config, seed=1)
    assert load_checkpoint(path, model=fresh, optimizer=fresh_optimizer, accelerator=accelerator) == state
    assert_identical(everything(model, optimizer), everything(fresh, fresh_optimizer))


def test_pieces_make_the_folder_that_a_whole_checkpoint_is(tiny_config, tmp_path, accelerator):
    model, optimizer = build(tiny_config)
    parts = {"model": model, "optimizer": optimizer, "accelerator": accelerator, "state": {"step": 0}}
    whole = save_checkpoint(tmp_path / "whole", **parts)
    consolidate_checkpoint(cut(save_checkpoint(tmp_path / "cut", **parts), 2), tmp_path / "out")
    others = {"optimizer.safetensors", "state.json", "manifest.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in whole.iterdir()} - others
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes(), path.name


def of_another_step(file: Path):
    other = save_small(file.parents[1] / "other", 7, Accelerator(cpu=True))
    shutil.copyfile(cut(other, 2) / file.name, file)
    shutil.rmtree(file.parents[1] / "other")


@pytest.mark.fault(3, 4, 5)
@pytest.mark.parametrize("file", ["model.shard-0002-of-0002.safetensors", "optimizer.shard-0001-of-0002.safetensors"])
@pytest.mark.parametrize("fault", [*DAMAGES, "is of step 7"])
def test_a_damaged_piece_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, accelerator, caplog, file, fault):
    for step in (1, 2):
        cut(save_small(tmp_path, step, accelerator), 2)
    {**DAMAGES, "is of step 7": of_another_step}[fault](tmp_path / "step-00000002" / file)
    assert assert_whole(latest_checkpoint(tmp_path), accelerator) == 1
    assert re.search(f"{file} {fault}", caplog.text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-step-00000002", "step-00000001"]


@pytest.mark.fault(3)
def test_pieces_that_are_not_listed_are_missed_too(tmp_path, accelerator, caplog):
    path = cut(save_small(tmp_path, 1, accelerator), 2)
    listed = json.loads((path / "manifest.json").read_text())
    del listed["files"]["optimizer.shard-0002-of-0002.safetensors"]
    (path / "manifest.json").write_text(json.dumps(listed))
    assert latest_checkpoint(tmp_path) is None
    assert "optimizer.shard-0002-of-0002.safetensors" in caplog.text


# A full disk


@pytest.mark.fault(6)
def test_without_room_nothing_is_written_and_the_message_says_how_much(tmp_path, accelerator, monkeypatch):
    save_small(tmp_path, 1, accelerator, keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1024))
    with pytest.raises(OSError, match=r"step-00000002 could not be written: it needs 0\.1 MiB, .* has 0\.0 MiB left"):
        save_small(tmp_path, 2, accelerator, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.fault(6)
def test_a_disk_that_fills_up_meanwhile_loses_the_new_checkpoint_only(tmp_path, accelerator, monkeypatch):
    def fill_up(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_small(tmp_path, 1, accelerator, keep=1)
    for module, name in ((manifest, "flush"), (checkpoint_module, "_write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fill_up)
            with pytest.raises(
                OSError, match=r"could not be written: .*No space left.* older checkpoints are untouched"
            ):
                save_small(tmp_path, 2, accelerator, keep=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert assert_whole(latest_checkpoint(tmp_path), accelerator) == 1


@pytest.mark.fault(7)
def test_an_output_folder_that_is_gone_or_closed_is_reported(tmp_path, accelerator):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/checkpoints/step-00000001 could not be written: .*Not a directory"):
        save_small(tmp_path / "file" / "checkpoints", 1, accelerator)


@pytest.fixture
def disk_of_three_mebibytes(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(6)
@pytest.mark.skipif(not shutil.which("mount") or sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("is_told", [True, False])
def test_a_disk_that_is_really_full(disk_of_three_mebibytes, accelerator, monkeypatch, is_told):
    folder = disk_of_three_mebibytes
    if not is_told:  # as with a quota: the free space is there, and may not be used
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, 1 << 40))

    def save(step):
        model, optimizer = small(step, size=400)  # 1.9 MB with its averages: one fits, two do not
        save_checkpoint(folder, model=model, optimizer=optimizer, state={"step": step}, accelerator=accelerator, keep=1)

    save(1)
    with pytest.raises(OSError, match="it needs 1.9 MiB" if is_told else "could not be written: .*No space left"):
        save(2)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert assert_whole(latest_checkpoint(folder), accelerator, size=400) == 1


# Being killed


class PowerCut(BaseException):
    """Like kill -9: nothing catches it, nothing cleans up."""


@pytest.mark.fault(1)
def test_a_stop_at_any_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, accelerator, monkeypatch):
    operations = [(os, "fsync"), (os, "rename"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text")]
    operations += [(checkpoint_module, "save_file"), (shutil, "rmtree")]
    survivors = []
    for steps in [(1, 2), (1, 1)]:  # a new step, and the same step again
        for stop_at in itertools.count(1):
            folder = tmp_path / f"{steps}-{stop_at}"
            save_small(folder, steps[0], accelerator, keep=1)
            count = 0

            def counted(function):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == stop_at:  # noqa: B023
                        raise PowerCut
                    return function(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                for owner, name in operations:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                try:
                    save_small(folder, steps[1], accelerator, keep=1)
                    finished = True
                except PowerCut:
                    finished = False
            survivors.append((steps, stop_at, assert_whole(latest_checkpoint(folder), accelerator)))
            save_small(folder, 3, accelerator, keep=1)  # the next save clears up what was left behind
            assert [path.name for path in folder.iterdir()] == ["step-00000003"]
            if finished:
                break
    assert {step for steps, _, step in survivors if steps == (1, 2)} == {1, 2}
    assert len(survivors) > 20


def kill_saves(folder: str, num_kills: int) -> None:
    """Kill a process that saves in a loop, again and again, and report what each left behind.

    Runs in a process of its own, that has computed nothing: torch's threads do not survive a fork.
    """
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    size = 256
    rng = random.Random(0)
    outcomes = []
    for _ in range(num_kills):
        saved, tell = os.pipe()
        child = os.fork()
        if child == 0:
            latest = latest_checkpoint(folder)
            first = 1 + (assert_whole(latest, accelerator, size) if latest else 0)
            for step in itertools.count(first):
                model, optimizer = small(step, size)
                save_checkpoint(
                    folder, model=model, optimizer=optimizer, state={"step": step}, accelerator=accelerator, keep=2
                )
                os.write(tell, b"x")
        start = time.perf_counter()
        os.close(tell)
        assert os.read(saved, 1) == b"x"  # one save is done, and took about as long as the next ones
        time.sleep(rng.uniform(0, 3) * (time.perf_counter() - start))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(saved)
        was_saving = any(path.suffix == ".tmp" for path in Path(folder).iterdir())
        latest = latest_checkpoint(folder)
        assert latest is not None
        outcomes.append({"step": assert_whole(latest, accelerator, size), "was_saving": was_saving})
    print(json.dumps(outcomes))


@pytest.mark.fault(1)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("num_kills", [4, pytest.param(84, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_always_leaves_a_whole_checkpoint(tmp_path, num_kills):
    code = f"from {__name__} import kill_saves; kill_saves({str(tmp_path)!r}, {num_kills})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr
    assert "broken" not in result.stderr  # none ever stood under its final name unfinished
    outcomes = json.loads(result.stdout.splitlines()[-1])
    steps = [outcome["step"] for outcome in outcomes]
    assert len(steps) == num_kills
    assert all(before < after for before, after in itertools.pairwise(steps))  # each resumed where the last one was
    assert sum(outcome["was_saving"] for outcome in outcomes) > num_kills / 4  # of 84, more than 20 hit a save
