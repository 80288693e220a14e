"""A sharded model is saved in pieces, in the background, and resumes on any number of processes and any mesh."""

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from hfllm.runs.sharded import consolidate, iterate_tensors
from hfllm.training.checkpoint import FILES, find_state, latest_checkpoint
from tests.distributed import pieces
from tests.distributed.launching import ROOT, columns, command, recipe, run
from tests.hub.double import Hub


pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "tests" / "distributed" / "pieces.py")
HSDP = ("--parallelism_config_dp_shard_size", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint of four processes in pieces, and the same gathered by torch."""
    path = tmp_path_factory.mktemp("pieces")
    launch(path, "straight", "fsdp2.yaml", 4)
    return path


def launch(folder, name, config, num_processes, *options):
    finished = run([*command(config, num_processes, *options), SCRIPT, str(folder), name])
    assert finished.returncode == 0, finished.stdout + finished.stderr


def outcomes(folder, name):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


def test_four_processes_each_write_a_part_and_together_they_are_what_torch_gathers(folder, tmp_path):
    checkpoint = folder / "checkpoints" / "step-00000002"
    for kind in ("model", "optimizer"):
        shards = sorted(checkpoint.glob(f"{kind}.shard-*"))
        assert [path.name for path in shards] == [f"{kind}.shard-000{i}-of-0004.safetensors" for i in (1, 2, 3, 4)]
        whole = load_file(folder / "whole" / "step-00000002" / f"{kind}.safetensors")
        num_bytes = sum(tensor.nbytes for tensor in whole.values())
        own = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards]
        assert sum(own) == num_bytes and max(own) < num_bytes / 3
        consolidate(checkpoint, kind, tmp_path / "consolidated")
        save_file(whole, tmp_path / "expected", metadata={"format": "pt"})
        assert (tmp_path / "consolidated").read_bytes() == (tmp_path / "expected").read_bytes()
    state, expected = (
        json.loads((path / "state.json").read_text()) for path in (checkpoint, folder / "whole" / "step-00000002")
    )
    assert (
        state["state"] == expected["state"]
        and state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    )
    assert set(state["optimizer"]["parameters"]) == set(expected["optimizer"]["parameters"])


@pytest.mark.fault(6, 11)
def test_a_save_that_fails_in_one_process_is_an_error_in_all_and_leaves_no_trace(folder):
    for outcome in outcomes(folder, "straight"):
        too_large, full, not_finite = outcome["errors"]
        assert "its disk has 0.0 MiB left" in too_large
        assert full.startswith("OSError") and "No space left on device" in full
        assert "older checkpoints are untouched" in full
        assert not_finite.startswith("FloatingPointError") and "layers.1.self_attn.q_proj.weight holds" in not_finite
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]


@pytest.mark.fault(1, 13)
def test_a_process_killed_while_it_writes_costs_that_checkpoint_only(folder):
    finished = run([*command("fsdp2.yaml", 2), SCRIPT, str(folder), "killed"])
    assert finished.returncode != 0 and not outcomes(folder, "killed")
    assert (folder / "checkpoints" / "step-00000003.tmp" / "model.shard-0002-of-0002.safetensors").exists()
    assert latest_checkpoint(folder / "checkpoints").name == "step-00000002"


@pytest.mark.parametrize(
    ("name", "config", "num_processes", "options", "sharding"),
    [
        ("two", "fsdp2.yaml", 2, (), "FSDP2"),
        ("four", "fsdp2.yaml", 4, (), "FSDP2"),
        ("groups", "hsdp.yaml", 4, HSDP, "HSDP 2 x 2"),
    ],
)
def test_it_resumes_on_another_mesh_to_the_same_bits_and_losses(folder, name, config, num_processes, options, sharding):
    launch(folder, name, config, num_processes, *options)
    for file in FILES[:2]:  # gathered again after loading
        assert (folder / name / "step-00000002" / file).read_bytes() == (
            folder / "whole" / "step-00000002" / file
        ).read_bytes()
    expected = outcomes(folder, "straight")[0]["losses"][2:]
    for outcome in outcomes(folder, name):
        assert (outcome["sharding"], outcome["resumed"]) == (sharding, 2)
    assert outcomes(folder, name)[0]["without_a_common_folder"] == list(FILES[:2])
    for outcome in outcomes(folder, name):
        assert outcome["losses"] == (expected if name == "four" else pytest.approx(expected, rel=1e-6))
    model = AutoModelForCausalLM.from_pretrained(folder / name / "out")
    weights = dict(iterate_tensors(folder / "checkpoints" / "step-00000002", "model"))
    for weight, tensor in model.state_dict().items():
        assert weight not in weights or torch.equal(tensor, weights[weight])


def test_one_process_resumes_what_four_saved(folder):
    accelerator = Accelerator(cpu=True)
    model, optimizer = pieces.build(accelerator, seed=1)
    find_state(folder, model=model, optimizer=optimizer, accelerator=accelerator, identity={})
    whole = folder / "whole" / "step-00000002"
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
    averages = load_file(whole / "optimizer.safetensors")
    own = {
        f"{name}.{what}": value
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
    }
    assert own.keys() == averages.keys() and all(torch.equal(own[name], averages[name]) for name in own)
    losses = pieces.train(model, optimizer, range(2, 4), accelerator)
    assert losses == pytest.approx(outcomes(folder, "straight")[0]["losses"][2:], rel=1e-6)


@pytest.mark.fault(22)
def test_the_recipe_keeps_the_best_pushes_what_it_saves_and_ends_with_one_file(small, tmp_path):
    """Two processes under FSDP2; the loss rises again, so that the best model is not the last one."""
    own = {"learning_rate": 0.1, "max_steps": 8, "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    own |= {"load_best_model_at_end": True, "push_to_hub": True, "hub_model_id": "me/my-gpt"}
    options = {**small, **own, "output_dir": tmp_path / "out"}
    with Hub() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token("me")}
        finished = run([*command("fsdp2.yaml", 2), *recipe(options)], **online, HF_HOME=str(tmp_path / "home"))
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "terminate called" not in finished.stderr
        first = next(commit for commit in hub.repositories["me/my-gpt"].commits.values() if "Step" in commit.message)
        pushed = load(first.files["model.safetensors"])
    log = columns(options["output_dir"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    best = metrics["best_step"]
    checkpoints = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints == sorted({f"step-{best:08d}", "step-00000008"} | ({"step-00000006"} if best == 8 else set()))
    final = load_file(tmp_path / "out" / "model.safetensors")
    weights = dict(iterate_tensors(tmp_path / "out" / "checkpoints" / f"step-{best:08d}", "model"))
    assert final.keys() == weights.keys() == pushed.keys()
    assert all(torch.equal(final[name], weights[name]) for name in final)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(opened.model.norm.weight, weights["model.norm.weight"])
    assert metrics["eval_loss"] == min(log["eval_loss"][1:])
