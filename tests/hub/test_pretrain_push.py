"""`recipes/pretrain.py --push_to_hub`: pushes during training, and faults of the Hub that do not end the run."""

import json
import logging
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load

import hfllm
from hfllm.hub import PushError, TrainingPush, push_to_hub
from hfllm.training.checkpoint import save_checkpoint
from tests.cutting import cut
from tests.recipes.conftest import run_pretrain, small, text_file, tokenizer_folder  # noqa: F401


@pytest.fixture
def pushed(small):  # noqa: F811
    return {**small, "push_to_hub": True, "hub_model_id": "me/my-gpt", "save_total_limit": 1}


def test_a_run_pushes_its_checkpoints_and_its_end(hub, run_pretrain, pushed):  # noqa: F811
    metrics = run_pretrain(**pushed)
    commits = list(hub.repositories["me/my-gpt"].commits.values())
    assert [commit.message for commit in commits] == ["initial commit", "Step 6", "End of training"]
    under_way = hfllm.GPTForCausalLM.from_pretrained("me/my-gpt", revision=commits[1].oid)
    final = hfllm.GPTForCausalLM.from_pretrained("me/my-gpt")
    there = load(hub.files("me/my-gpt")["model.safetensors"])
    assert torch.equal(final.model.norm.weight, there["model.norm.weight"])
    assert not torch.equal(under_way.model.norm.weight, final.model.norm.weight)
    assert "metrics.json" not in commits[1].files
    assert json.loads(hub.files("me/my-gpt")["metrics.json"])["eval_loss"] == metrics["eval_loss"]
    assert not (pushed["output_dir"] / ".hub-snapshot").exists()


@pytest.mark.fault(22)
def test_a_hub_that_fails_ends_no_run_and_the_push_can_be_repeated(hub, run_pretrain, pushed):  # noqa: F811
    hub.fail("POST", "/commit/", status=503, times=999)
    with pytest.warns(UserWarning, match=r"End of training was not pushed.*(\n.*)*recipes/push_to_hub.py --model"):
        metrics = run_pretrain(**pushed)
    assert metrics["train_steps"] == 12
    hub.faults.clear()
    push_to_hub(pushed["output_dir"], "me/my-gpt")
    assert hub.files("me/my-gpt")["model.safetensors"] == (pushed["output_dir"] / "model.safetensors").read_bytes()


@pytest.mark.fault(22, 23)
def test_the_same_command_makes_up_for_a_push_that_failed_and_for_nothing_else(
    hub,
    run_pretrain,  # noqa: F811
    pushed,
    capsys,
):
    hub.fail("POST", "/commit/", status=503, times=999)
    with pytest.warns(UserWarning, match="End of training was not pushed"):
        run_pretrain(**pushed)
    hub.faults.clear()
    weights = (pushed["output_dir"] / "model.safetensors").stat().st_mtime_ns
    run_pretrain(**pushed)
    assert "model.safetensors" in hub.files("me/my-gpt")
    assert (pushed["output_dir"] / "model.safetensors").stat().st_mtime_ns == weights
    num_commits = hub.num_commits("me/my-gpt")
    capsys.readouterr()
    run_pretrain(**pushed)
    assert "nothing to do" in capsys.readouterr().out and hub.num_commits("me/my-gpt") == num_commits


@pytest.mark.fault(22)
def test_a_hub_that_is_down_at_the_start_is_a_warning(hub, run_pretrain, pushed):  # noqa: F811
    hub.fail("POST", "/api/repos/create", status=503)
    with pytest.warns(UserWarning, match="The training starts, and pushes when it saves"):
        run_pretrain(**{**pushed, "hub_strategy": "end"})
    assert hub.num_commits("me/my-gpt") == 2


def test_a_token_that_may_not_write_there_stops_the_run_before_it_trains(hub, run_pretrain, pushed):  # noqa: F811
    hub.create("you/theirs")
    for repo_id in ("google/my-gpt", "you/theirs"):
        with pytest.raises(PushError, match=f"may not write to {repo_id}"):
            run_pretrain(**{**pushed, "hub_model_id": repo_id})
    assert not (pushed["output_dir"] / "log.jsonl").exists()


def test_a_place_to_push_to_without_a_push_is_an_error(run_pretrain, small):  # noqa: F811
    with pytest.raises(ValueError, match="are for --push_to_hub"):
        run_pretrain(**small, hub_model_id="me/my-gpt")


def test_the_page_and_the_card_stand_in_the_runs_folder(run_pretrain, small, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING):
        run_pretrain(**{**small, "max_steps": 6})
    card, page = ((small["output_dir"] / name).read_text() for name in ("README.md", "report.html"))
    assert "model-index" in card and str(small["output_dir"].parent) not in card
    assert page.startswith("<!DOCTYPE html>") and "Bits per byte" in page


def test_a_checkpoint_in_pieces_is_pushed_as_one_model(hub, make_run, tmp_path):
    run = make_run()
    shutil.copytree(run, tmp_path / "run")
    model = hfllm.GPTForCausalLM.from_pretrained(run)
    parts = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "accelerator": Accelerator(cpu=True)}
    checkpoint = cut(save_checkpoint(tmp_path / "run" / "checkpoints", state={"step": 3}, **parts), 4)
    push = TrainingPush(tmp_path / "run", "me/my-gpt")
    push.push_checkpoint(checkpoint, model, step=3)
    push.thread.join()
    there = load(hub.files("me/my-gpt")["model.safetensors"])
    assert there.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert all(torch.equal(there[name], model.state_dict()[name]) for name in there)
