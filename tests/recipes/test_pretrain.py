import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hfllm
from hfllm.data import load_corpus, rows_of_step, split_documents
from hfllm.runs.log import read_log


def losses_of(output_dir) -> list[float]:
    return [entry["loss"] for entry in read_log(Path(output_dir) / "log.jsonl") if "loss" in entry]


def test_a_run_leaves_what_everybodys_tools_open(run_pretrain, small):
    metrics = run_pretrain(draw=True, **{**small, "sample_tokens": 4}, sample_prompt="the cat")
    out = small["output_dir"]
    assert {path.name for path in out.iterdir()} >= {
        *("model.safetensors", "config.json", "generation_config.json", "modeling_gpt.py", "configuration_gpt.py"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("arguments.yaml", "metrics.json", "log.jsonl", "curves.png", "samples.txt", "checkpoints"),
    }
    _, *samples = (out / "samples.txt").read_text().split("--- ")
    assert [sample.split("\n")[0] for sample in samples] == ["step 6", "step 12"]
    assert all(sample.split("\n", 1)[1].startswith("the cat") for sample in samples)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert type(model) is hfllm.GPTForCausalLM
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer) == 300
    assert metrics["train_tokens"] == 12 * 4 * 32
    assert metrics["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    [answer] = pipeline("text-generation", str(out))("the cat", max_new_tokens=4)
    assert answer["generated_text"].startswith("the cat")


def test_the_evaluation_before_the_first_step_can_be_left_out(run_pretrain, small):
    run_pretrain(**small, eval_on_start=False)
    log = read_log(small["output_dir"] / "log.jsonl")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [6, 12]


def test_validation_texts_of_ones_own_are_measured_one_by_one(run_pretrain, small, tmp_path):
    (tmp_path / "fr.txt").write_text("le chat voit le chien. " * 20)
    (tmp_path / "uk.txt").write_text("the cat sees a dog. " * 20)
    given = f"{tmp_path}/fr.txt,{tmp_path}/uk.txt"
    metrics = run_pretrain(**{**small, "max_steps": 2, "eval_steps": 2}, validation_dataset=given)
    names = [f"eval_{name}_{language}" for name in ("loss", "bits_per_byte") for language in ("fr", "uk")]
    evaluations = [entry for entry in read_log(small["output_dir"] / "log.jsonl") if "eval_loss" in entry]
    assert {name: evaluations[-1][name] for name in names} == {name: metrics[name] for name in names}
    assert metrics["eval_bytes"] == 20 * (23 + 20)
    bits = [metrics[f"eval_bits_per_byte_{language}"] * 20 * size for language, size in (("fr", 23), ("uk", 20))]
    assert metrics["eval_bits_per_byte"] == pytest.approx(sum(bits) / metrics["eval_bytes"])


def test_a_run_below_the_folder_of_its_text_resumes(run_pretrain, small, tmp_path):
    shutil.copy(small["dataset"], tmp_path / "animals.jsonl")
    options = {**small, "dataset": tmp_path, "sample_tokens": 4, "lr_scheduler_type": "constant"}
    assert run_pretrain(**{**options, "max_steps": 6})["train_steps"] == 6
    assert run_pretrain(**{**options, "max_steps": 8})["train_steps"] == 8  # in spite of samples.txt, log.jsonl, ...


def test_the_configuration_of_least_time_trains_what_is_exactly_a_qwen3(run_pretrain, small):
    sizes = ("block_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "eval_steps", "save_steps")
    kept = {name: value for name, value in small.items() if name not in sizes}
    path = "recipes/configs/pretrain_time_to_quality.yaml"
    run_pretrain(**{**kept, "config": Path(__file__).parents[2] / path, "warmup_steps": 0, "max_steps": 2})
    model = AutoModelForCausalLM.from_pretrained(small["output_dir"])
    assert type(hfllm.to_native(model, "qwen3")).__name__ == "Qwen3ForCausalLM"
    assert not model.config.tie_word_embeddings


def test_the_loss_falls(run_pretrain, small):
    metrics = run_pretrain(**{**small, "max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 1e-2})
    losses = losses_of(small["output_dir"])
    assert losses[0] == pytest.approx(math.log(300), rel=0.02)
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["eval_loss"] < 0.5 * losses[0]


def test_bits_per_byte_is_the_code_length_of_the_held_out_documents(run_pretrain, small):
    """Counted again by hand: one document after the other, each with its start and end token."""
    # A row holds every held-out document whole, so packing may not change what each is scored at.
    metrics = run_pretrain(**{**small, "block_size": 1024, "per_device_train_batch_size": 1})
    model = AutoModelForCausalLM.from_pretrained(small["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(small["output_dir"])
    corpus = load_corpus(str(small["dataset"]), cache_dir=small["cache_dir"])
    _, held_out = split_documents(corpus, validation_fraction=0.2)
    nats = num_tokens = num_bytes = 0
    for text in held_out["text"]:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        log_probabilities = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        nats -= log_probabilities[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        num_tokens += len(ids) - 1
        num_bytes += len(text.encode())
    assert metrics["eval_tokens"] == num_tokens
    assert metrics["eval_bytes"] == num_bytes
    assert metrics["eval_loss"] == pytest.approx(nats / num_tokens, rel=1e-6)
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_a_step_has_one_loss_however_its_rows_are_cut(run_pretrain, small, tmp_path, rows, accumulation):
    """The rows hold different numbers of targets, so a mean of means would show."""
    options = {**small, "max_steps": 4, "warmup_steps": 0, "eval_steps": 4, "learning_rate": 1e-2}
    run_pretrain(**{**options, "output_dir": tmp_path / "whole", "per_device_train_batch_size": 8})
    parts = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    run_pretrain(**{**options, "output_dir": tmp_path / "parts", **parts})
    whole, cut = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    for key in ("loss", "grad_norm"):
        values = [[entry[key] for entry in log if key in entry] for log in (whole, cut)]
        np.testing.assert_allclose(values[0], values[1], rtol=2e-6)


def test_the_first_loss_is_a_hand_count_over_the_steps_rows(run_pretrain, small):
    """The sum over all targets of the step divided by their number, from the saved weights of a run without steps."""
    options = {**small, "max_steps": 1, "warmup_steps": 0, "learning_rate": 0.0, "eval_steps": 1, "seed": 7}
    run_pretrain(**options)
    recipe = run_pretrain.recipe
    model = AutoModelForCausalLM.from_pretrained(small["output_dir"])  # the rate is 0: still the first weights
    args = recipe.PretrainArguments(
        **{name: str(value) if name.endswith("dir") else value for name, value in options.items()}
    )
    args.dataset = str(args.dataset)
    data = recipe.load_text(args, AutoTokenizer.from_pretrained(small["output_dir"]), recipe.start_accelerator())
    [rows] = rows_of_step(0, rows_per_step=4, num_rows=len(data.train), seed=7)
    nats, targets = 0.0, 0
    for row in rows:
        batch = data.train.batch(np.array([row]))
        log_probabilities = model(
            batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.log_softmax(-1)
        for index, label in enumerate(batch["shift_labels"][0].tolist()):
            if label != -100:
                nats -= log_probabilities[0, index, label].item()
                targets += 1
    assert losses_of(small["output_dir"]) == [pytest.approx(nats / targets, rel=1e-5)]


def test_a_logged_loss_is_the_mean_over_the_tokens_since_the_line_before(run_pretrain, small, tmp_path):
    run_pretrain(**{**small, "output_dir": tmp_path / "every"})
    run_pretrain(**{**small, "output_dir": tmp_path / "sixth", "logging_steps": 6})
    recipe = run_pretrain.recipe
    args = recipe.PretrainArguments(
        dataset=str(small["dataset"]), cache_dir=str(small["cache_dir"]), validation_fraction=0.2, block_size=32
    )
    data = recipe.load_text(args, AutoTokenizer.from_pretrained(small["tokenizer"]), recipe.start_accelerator())
    order = {"rows_per_step": 4, "num_rows": len(data.train), "seed": 42}
    targets = [data.train.num_targets[rows_of_step(step, **order)[0]].sum() for step in range(12)]
    assert len(set(targets)) > 1  # or a mean of means would be the same
    each = losses_of(tmp_path / "every")
    expected = [np.average(each[first : first + 6], weights=targets[first : first + 6]) for first in (0, 6)]
    np.testing.assert_allclose(losses_of(tmp_path / "sixth"), expected, rtol=1e-6)


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_a_run_that_was_cut_ends_with_the_very_weights_of_one_that_was_not(run_pretrain, small, tmp_path, preset):
    """Dropout and the order of rows included."""
    options = {**small, "preset": preset, "config_overrides": ["residual_dropout=0.1", "attention_dropout=0.1"]}
    run_pretrain(**{**options, "output_dir": tmp_path / "straight"})
    cut = {**options, "output_dir": tmp_path / "cut", "save_steps": 5}
    recipe = run_pretrain.recipe
    original = recipe.StopRequest.agreed
    recipe.StopRequest.agreed = lambda self: read_log(tmp_path / "cut" / "log.jsonl")[-1]["step"] == 6
    with pytest.raises(SystemExit) as stopped:
        run_pretrain(**cut)
    recipe.StopRequest.agreed = original
    assert stopped.value.code == 143
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    # What may change when a run resumes: its folder, how often it saves and evaluates, how many rows at a time.
    (tmp_path / "cut").rename(tmp_path / "moved")
    may_change = {"save_steps": 4, "save_total_limit": 1, "eval_steps": 12, "per_device_eval_batch_size": 3}
    run_pretrain(**{**cut, "output_dir": tmp_path / "moved", **may_change})
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "moved"))
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
    assert losses_of(tmp_path / "straight") == losses_of(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.fixture
def overfitting(small, tmp_path) -> dict:
    """Options of a run whose validation loss falls and then rises: it is validated on other text than it learns."""
    draw = random.Random(0)
    (tmp_path / "other.txt").write_text("".join(draw.choice("the catsdogbird. ") for _ in range(1500)))
    steps = {"max_steps": 18, "warmup_steps": 0, "eval_steps": 3, "save_steps": 4, "save_total_limit": 1}
    return {**small, **steps, "validation_dataset": tmp_path / "other.txt", "lr_scheduler_type": "constant"}


def validation_losses(output_dir) -> dict[int, float]:
    """By their steps, without the one before the first step."""
    log = read_log(output_dir / "log.jsonl")
    return {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"] > 0}


def assert_same_weights(*folders):
    left, right = (load_file(folder / "model.safetensors") for folder in folders)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def checkpoints_of(output_dir) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def run_until(run_pretrain, monkeypatch, step, **options):
    """A run that stops after this step, as by a signal."""
    log = options["output_dir"] / "log.jsonl"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_pretrain.recipe.StopRequest, "agreed", lambda self: step in validation_losses(log.parent))
        run_pretrain(**options)


def test_the_best_model_on_validation_is_kept(run_pretrain, overfitting, tmp_path):
    out, last = tmp_path / "out", tmp_path / "last"
    metrics = run_pretrain(**overfitting, load_best_model_at_end=True)
    losses = validation_losses(out)
    best = min(losses, key=losses.get)
    assert best < 18 and losses[best] < losses[18] - 0.01
    assert checkpoints_of(out) == [f"step-{best:08d}", "step-00000018"]  # beside the newest, however old
    assert_same_weights(out, out / "checkpoints" / f"step-{best:08d}")
    assert (metrics["best_step"], metrics["eval_loss"], metrics["train_steps"]) == (best, losses[best], 18)

    # By default the last model is saved, and nothing is checkpointed for the sake of an evaluation.
    metrics = run_pretrain(**{**overfitting, "output_dir": last})
    assert checkpoints_of(last) == ["step-00000018"]
    assert_same_weights(last, out / "checkpoints" / "step-00000018")
    assert metrics["eval_loss"] == losses[18] and "best_step" not in metrics
    assert losses_of(last) == losses_of(out)


def test_a_run_that_was_cut_keeps_the_same_best_model(run_pretrain, overfitting, tmp_path, monkeypatch):
    options = {**overfitting, "load_best_model_at_end": True}
    straight = run_pretrain(**{**options, "output_dir": tmp_path / "straight"})
    cut = {**options, "output_dir": tmp_path / "cut"}
    run_until(run_pretrain, monkeypatch, 15, **cut)  # after the best step
    resumed = run_pretrain(**cut)
    assert straight["best_step"] < 15
    assert {name: straight[name] for name in ("best_step", "eval_loss", "train_steps")} == {
        name: resumed[name] for name in ("best_step", "eval_loss", "train_steps")
    }
    assert_same_weights(tmp_path / "straight", tmp_path / "cut")
    assert checkpoints_of(tmp_path / "straight") == checkpoints_of(tmp_path / "cut")
    assert validation_losses(tmp_path / "straight") == validation_losses(tmp_path / "cut")


def test_a_run_stops_early_where_the_validation_loss_no_longer_falls(
    run_pretrain, overfitting, tmp_path, monkeypatch, capsys
):
    run_pretrain(**{**overfitting, "output_dir": tmp_path / "whole"})
    losses = validation_losses(tmp_path / "whole")
    best = min(losses, key=losses.get)
    patient = {**overfitting, "early_stopping_patience": 2, "output_dir": tmp_path / "patient"}
    run_until(run_pretrain, monkeypatch, best + 3, **patient)  # the count continues after a resume
    capsys.readouterr()
    metrics = run_pretrain(**patient)
    assert best + 6 < 18 and metrics["train_steps"] == best + 6
    assert metrics["eval_loss"] == losses[best + 6]  # the last model: the best one is kept if that is asked for
    printed = capsys.readouterr().out
    assert f"Stopped early at step {best + 6} of 18: 2 evaluations in a row without a lower validation loss" in printed
    run_pretrain(**patient)
    printed = capsys.readouterr().out
    assert f"ended at step {best + 6}: nothing to do" in printed and "a larger --early_stopping_patience" in printed
    assert run_pretrain(**{**patient, "early_stopping_patience": 9})["train_steps"] == 18
    assert_same_weights(tmp_path / "whole", tmp_path / "patient")


def test_without_the_best_checkpoint_the_last_model_is_saved_and_that_is_reported(
    run_pretrain, overfitting, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    original = run_pretrain.recipe.train

    def train(*args):
        speed = original(*args)
        losses = validation_losses(out)
        (best,) = (out / "checkpoints").glob(f"step-*{min(losses, key=losses.get):02d}")
        with (best / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        return speed

    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain.recipe, "train", train)
        with pytest.raises(ValueError, match=r"is missing or broken\. Start the same command again to save .* step 18"):
            run_pretrain(**overfitting, load_best_model_at_end=True)
    assert not (out / "model.safetensors").exists()
    metrics = run_pretrain(**overfitting, load_best_model_at_end=True)
    assert "the best one so far, is missing or broken" in capsys.readouterr().out
    assert metrics["best_step"] == 18 and metrics["eval_loss"] == validation_losses(out)[18]
    assert_same_weights(out, out / "checkpoints" / "step-00000018")


@pytest.mark.fault(20)
def test_a_finished_run_has_nothing_to_do(run_pretrain, small, capsys):
    run_pretrain(**small)
    weights = (small["output_dir"] / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run_pretrain(**small)
    assert "nothing to do" in capsys.readouterr().out
    assert (small["output_dir"] / "model.safetensors").stat().st_mtime_ns == weights


def test_a_finished_run_resumes_with_more_steps(run_pretrain, small):
    run_pretrain(**small)
    metrics = run_pretrain(**{**small, "max_steps": 15})
    assert metrics["train_steps"] == 15


def test_overwriting_starts_again_and_keeps_files_that_are_not_ours(run_pretrain, small):
    run_pretrain(**small)
    (small["output_dir"] / "notes.txt").write_text("mine")
    metrics = run_pretrain(**{**small, "max_steps": 6, "overwrite_output_dir": True})
    assert metrics["train_steps"] == 6
    assert (small["output_dir"] / "notes.txt").read_text() == "mine"
    assert len(losses_of(small["output_dir"])) == 6


@pytest.mark.parametrize(
    ("given", "optimizer", "rates"),
    [
        ({}, "muon", (0.02, 0.02)),
        ({"model": "a model's folder", "optimizer": "muon"}, "muon", (0.02, 0.02)),
        ({"learning_rate": 0.03, "adam_learning_rate": 0.002}, "muon", (0.03, 0.002)),
        ({"preset": "book"}, "adamw", (0.001, None)),
        ({"model": "a model's folder"}, "adamw", (0.001, None)),
    ],
)
def test_random_weights_of_the_modern_preset_train_with_muon_and_all_else_with_adamw(
    run_pretrain, given, optimizer, rates
):
    args = run_pretrain.recipe.PretrainArguments(**given)
    args.resolve()
    assert args.optimizer == optimizer
    assert (args.learning_rate, args.adam_learning_rate) == pytest.approx(rates)


def test_going_on_from_a_model_starts_at_its_loss(run_pretrain, small, tmp_path):
    first = run_pretrain(**small)
    run_pretrain(**{**small, "output_dir": tmp_path / "second", "model": small["output_dir"], "learning_rate": 1e-4})
    log = read_log(tmp_path / "second" / "log.jsonl")
    assert log[0]["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)


def test_a_model_that_was_saved_in_half_precision_is_trained_in_full(run_pretrain, small, tmp_path):
    run_pretrain(**small)
    model = AutoModelForCausalLM.from_pretrained(small["output_dir"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    options = {**small, "output_dir": tmp_path / "second", "model": tmp_path / "half"}
    run_pretrain(**options)
    weights = load_file(tmp_path / "second" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_any_causal_model_of_transformers_can_be_trained_on(run_pretrain, small, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "llama")
    options = {**small, "model": tmp_path / "llama", "max_steps": 40, "eval_steps": 40, "learning_rate": 1e-2}
    run_pretrain(**options)
    losses = losses_of(small["output_dir"])
    assert losses[0] == pytest.approx(math.log(300), rel=0.02)
    assert losses[-1] < 0.8 * losses[0]


def test_a_folder_with_somebody_elses_model_is_not_overwritten(run_pretrain, small):
    small["output_dir"].mkdir()
    (small["output_dir"] / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a model that no run of this recipe made"):
        run_pretrain(**small)


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"dataset": "nowhere.txt"}, "nowhere"), ({"tokenizer": "nowhere"}, "nowhere"), ({"warmup_steps": 50}, "warmup")],
)
def test_a_mistake_elsewhere_in_the_command_leaves_the_run_that_was_to_be_overwritten(
    run_pretrain, small, wrong, message
):
    run_pretrain(**small)
    before = {path: path.read_bytes() for path in small["output_dir"].rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError), match=message):
        run_pretrain(**{**small, **wrong, "overwrite_output_dir": True})
    assert {path: path.read_bytes() for path in small["output_dir"].rglob("*") if path.is_file()} == before


@pytest.mark.fault(32)
@pytest.mark.parametrize("place", ["", "checkpoints/step-00000012"])
def test_the_folder_of_the_model_is_not_overwritten(run_pretrain, small, place):
    run_pretrain(**small)
    weights = (small["output_dir"] / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"is model itself|model .* is in output_dir"):
        run_pretrain(**{**small, "model": small["output_dir"] / place, "overwrite_output_dir": True})
    assert (small["output_dir"] / "model.safetensors").read_bytes() == weights


@pytest.mark.fault(23)
def test_a_run_whose_end_was_cut_off_is_ended_by_the_same_command(run_pretrain, small, monkeypatch):
    """Killed between its last checkpoint and its model, or while the finished run of fewer steps was extended."""
    run_pretrain(**{**small, "max_steps": 6})
    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain.recipe.CheckpointSaver, "save_model", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pretrain(**small)
    assert json.loads((small["output_dir"] / "metrics.json").read_text())["train_steps"] == 6
    assert run_pretrain(**small)["train_steps"] == 12
    checkpoint = load_file(small["output_dir"] / "checkpoints" / "step-00000012" / "model.safetensors")
    model = load_file(small["output_dir"] / "model.safetensors")
    assert all(torch.equal(model[name], checkpoint[name]) for name in model)


@pytest.mark.fault(20, 23)
def test_what_is_missing_of_a_finished_run_is_done_by_the_same_command(run_pretrain, small, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain.recipe, "write_page_and_card", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_pretrain(**small)
    weights = (small["output_dir"] / "model.safetensors").stat().st_mtime_ns
    assert not (small["output_dir"] / "report.html").exists()
    run_pretrain(**small)
    assert (small["output_dir"] / "report.html").exists() and (small["output_dir"] / "README.md").exists()
    assert (small["output_dir"] / "model.safetensors").stat().st_mtime_ns == weights
    (small["output_dir"] / "model.safetensors").write_bytes(b"half of a mod")
    capsys.readouterr()
    run_pretrain(**small)
    assert load_file(small["output_dir"] / "model.safetensors")
    run_pretrain(**small)
    assert "nothing to do" in capsys.readouterr().out


def test_a_checkpoint_of_a_run_starts_another_one(run_pretrain, small, tmp_path):
    """With another schedule, which the run itself refuses, and says so."""
    run_pretrain(**small)
    checkpoint = small["output_dir"] / "checkpoints" / "step-00000006"
    with pytest.raises(ValueError, match=r"start a new run from them: model=.* and another output_dir"):
        run_pretrain(**{**small, "learning_rate": 0.001})
    other = {"model": checkpoint, "tokenizer": checkpoint, "learning_rate": 0.001, "output_dir": tmp_path / "other"}
    del small["hidden_size"], small["num_hidden_layers"], small["num_attention_heads"]
    run_pretrain(**{**small, **other})
    first = json.loads((tmp_path / "other" / "log.jsonl").read_text().splitlines()[0])
    before = [entry for entry in read_log(tmp_path / "out" / "log.jsonl") if entry["step"] == 6]
    assert first["eval_loss"] == pytest.approx(before[0]["eval_loss"], rel=1e-5)


@pytest.mark.fault(26)
def test_a_run_that_began_from_another_model_is_refused(run_pretrain, small, tmp_path):
    run_pretrain(**{**small, "output_dir": tmp_path / "base", "max_steps": 6})
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    options = {name: value for name, value in small.items() if name not in shape} | {"model": tmp_path / "base"}
    run_pretrain(**options)
    run_pretrain(**{**small, "output_dir": tmp_path / "base"})  # trained further
    with pytest.raises(ValueError, match="base_sha256 was "):
        run_pretrain(**{**options, "max_steps": 20})


def test_more_steps_in_mid_run_tell_what_they_do_to_the_learning_rate(run_pretrain, small, capsys):
    run_pretrain(**small, lr_scheduler_type="linear", min_lr_ratio=0)
    run_pretrain(**{**small, "max_steps": 22, "save_steps": 5}, lr_scheduler_type="linear", min_lr_ratio=0)
    told = capsys.readouterr().out
    # 0.02 falls to 0 over the steps after the two of warm-up: at 12 of 22, ten of twenty are left.
    assert "at step 12 it is 0.01 instead of 0" in told
    assert "save_steps was 6 and is 5 from here on." in told


def test_windows_of_one_long_text_train_and_are_scored_once(run_pretrain, small, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("the cat sees a dog. my bird likes one fish. " * 60)
    metrics = run_pretrain(**{**small, "dataset": text, "stride": 8, "validation_fraction": 0.25})
    tokenizer = AutoTokenizer.from_pretrained(small["output_dir"])
    held_out = text.read_text()[int(len(text.read_text()) * 0.75) :]
    assert metrics["eval_tokens"] == len(tokenizer.encode(held_out, add_special_tokens=False)) - 1


@pytest.mark.fault(11)
def test_a_gradient_that_is_not_finite_updates_nothing_and_in_the_end_stops_the_run(run_pretrain, small, monkeypatch):
    recipe = run_pretrain.recipe
    monkeypatch.setattr(
        recipe.Accelerator, "clip_grad_norm_", lambda self, parameters, max_norm: torch.tensor(float("nan"))
    )
    with pytest.raises(ValueError, match="not finite 10 times in a row, up to step 10"):
        run_pretrain(**small)
    weights = load_file(small["output_dir"] / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def make(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


BAD_INPUT = {
    "no such dataset": ({"dataset": "nowhere.txt"}, r"nowhere\.txt"),
    "an empty file": (lambda folder: {"dataset": make(folder, "empty.txt", b"")}, r"empty\.txt"),
    "shorter than a row": (
        lambda folder: {"dataset": make(folder, "short.txt", b"a few words only")},
        "smaller block_size",
    ),
    "not UTF-8": (lambda folder: {"dataset": make(folder, "latin.txt", b"caf\xe9 " * 100)}, r"latin\.txt"),
    "a corrupt JSON line": (
        lambda folder: {"dataset": make(folder, "bad.jsonl", b'{"text": "fine"}\n{"text": \n')},
        r"bad\.jsonl.*line 2",
    ),
    "no such column": ({"text_column": "body"}, "'body'.*text"),
    "no such tokenizer": ({"tokenizer": "./nowhere"}, "nowhere"),
    "heads that do not divide": ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple"),
    "an unknown field": ({"config_overrides": ["atention_bias=true"]}, "did you mean 'attention_bias'"),
    "a vocabulary too small": ({"config_overrides": ["vocab_size=100"]}, "300 ids.*vocab_size is 100"),
    "a block longer than the positions": (
        {"config_overrides": ["max_position_embeddings=16"]},
        "block_size=32 is longer than the model.s context of 16 tokens",
    ),
    "no rows": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0"),
    "more warm-up than steps": ({"warmup_steps": 100}, "warmup_steps=100"),
    "no steps": ({"max_steps": 0}, "max_steps 0"),
    "rows of a stream again": (
        {"streaming": True, "eval_train_rows": 4},
        "--eval_train_rows reads rows again, and --streaming reads them once",
    ),
    "a rate for another optimizer": (
        {"optimizer": "adamw", "adam_learning_rate": 0.1},
        "--adam_learning_rate belongs to --optimizer muon",
    ),
    "a momentum of all": ({"muon_momentum": 1.0}, "--muon_momentum 1.0"),
    "nothing held back": ({"validation_fraction": 0.0}, "nothing to evaluate on"),
    "a file in the way": (lambda folder: {"output_dir": make(folder, "file", b"")}, "is a file. Give the path"),
}


@pytest.mark.fault(14, 15, 16, 18)
@pytest.mark.parametrize(("wrong", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_stops_before_the_work_starts(run_pretrain, small, tmp_path, wrong, message):
    wrong = wrong(tmp_path) if callable(wrong) else wrong
    with pytest.raises((ValueError, OSError)) as error:
        run_pretrain(**{**small, **wrong})
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert not (small["output_dir"] / "log.jsonl").exists()


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "model.hidden_size was 32 and is 64"),
        ({"learning_rate": 0.5}, "learning_rate was 0.02 and is 0.5"),
        ({"per_device_train_batch_size": 8}, "rows_per_step was 4 and is 8"),
        ({"validation_fraction": 0.3}, "rows was "),
    ],
)
def test_a_run_that_exists_with_another_shape_is_refused(run_pretrain, small, change, message):
    run_pretrain(**small)
    with pytest.raises(ValueError, match="overwrite_output_dir") as error:
        run_pretrain(**{**small, **change, "max_steps": 20})
    assert message in str(error.value)


@pytest.mark.fault(19)
@pytest.mark.parametrize(("streaming", "told"), [(False, "corpus_sha256"), (True, "stream.sha256")])
def test_a_text_that_changed_since_is_refused_with_the_difference_shown(
    run_pretrain, small, text_file, tmp_path, streaming, told
):
    """One letter, so that the number of documents, of bytes and perhaps of rows is what it was."""
    text = tmp_path / "text.jsonl"
    text.write_text(text_file.read_text())
    options = {**small, "dataset": text, "streaming": streaming, "max_steps": 6}
    run_pretrain(**options)
    weights = (small["output_dir"] / "model.safetensors").read_bytes()
    text.write_text(text_file.read_text().replace("cat", "bat", 1))
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run_pretrain(**{**options, "max_steps": 12})
    assert told in str(error.value)
    assert (small["output_dir"] / "model.safetensors").read_bytes() == weights


def test_a_tracker_gets_what_the_log_gets(run_pretrain, small):
    run_pretrain(**small, report_to="tensorboard")
    assert list(small["output_dir"].rglob("events.out.tfevents*"))


@pytest.mark.fault(22)
@pytest.mark.slow
def test_a_tracker_that_fails_does_not_end_the_run(run_pretrain, small, monkeypatch):
    def fail(self, values, step=None, **kwargs):
        raise ConnectionError("the tracker's server is gone")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
    with pytest.warns(UserWarning, match="server is gone"):
        metrics = run_pretrain(**small, report_to=["tensorboard"])
    assert metrics["train_steps"] == 12
    assert len(losses_of(small["output_dir"])) == 12


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(run_pretrain, small, tmp_path):
    """DDP over gloo by plain torchrun: the same losses, though each process sees half of a step's rows."""
    options = {**small, "max_steps": 6, "learning_rate": 1e-2, "save_steps": 6}
    run_pretrain(**{**options, "output_dir": tmp_path / "one"})
    two = {**options, "output_dir": tmp_path / "two", "per_device_train_batch_size": 2}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("recipes/pretrain.py", *(f"--{name}={value}" for name, value in two.items())),
    ]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=240)
    one, both = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte"):
        values = [[entry[key] for entry in log if key in entry] for log in (one, both)]
        np.testing.assert_allclose(values[0], values[1], rtol=2e-6, err_msg=key)


@pytest.mark.fault(10)
@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_the_same_command_resumes(small, signal_number):
    """The command of the README, through accelerate's launcher, stopped by a real signal."""
    root = Path(__file__).parents[2]
    options = {**small, "max_steps": 200, "eval_steps": 200, "save_steps": 1000}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"),
        *("recipes/pretrain.py", *(f"--{name}={value}" for name, value in options.items())),
    ]
    log = small["output_dir"] / "log.jsonl"
    process = subprocess.Popen(command, cwd=root, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["pkill", f"-{int(signal_number)}", "-g", str(process.pid)], check=True)
    assert process.wait(60) != 0
    deadline = time.monotonic() + 60
    while not list((small["output_dir"] / "checkpoints").glob("step-????????")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(command, cwd=root, check=True, timeout=240)
    assert json.loads((small["output_dir"] / "metrics.json").read_text())["train_steps"] == 200
    assert len(losses_of(small["output_dir"])) == 200


def test_a_dry_run_tells_what_the_run_would_need_and_writes_nothing(run_pretrain, small, tmp_path, capsys):
    run_pretrain(**{**small, "output_dir": tmp_path / "dry", "dry_run": True})
    told = capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    num_parameters = 30_304
    assert f"{4 * num_parameters / 2**20:10,.1f} MiB" in told  # parameters, and as much for the gradients
    assert "kept for the backward pass" in told
    assert "1.00e-02 at step 0" in told  # half of it, in two steps of warm-up
    assert "tokens 0 to" in told and "targets" in told
    assert "This was a dry run: nothing was written" in told


def test_a_dry_run_does_not_change_an_existing_run(run_pretrain, small, tmp_path, capsys):
    run_pretrain(**{**small, "output_dir": tmp_path / "run"})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run_pretrain(**{**small, "output_dir": tmp_path / "run", "dry_run": True, "overwrite_output_dir": True})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert "would resume from step-" in capsys.readouterr().out


def test_a_streamed_run_that_is_cut_resumes_to_the_same_weights(run_pretrain, small, tmp_path):
    streamed = {"streaming": True, "max_steps": 12, "save_steps": 6}
    run_pretrain(**{**small, "output_dir": tmp_path / "whole", **streamed})
    recipe = run_pretrain.recipe
    original = recipe.StopRequest.agreed
    recipe.StopRequest.agreed = lambda self: read_log(tmp_path / "cut" / "log.jsonl")[-1]["step"] == 6
    with pytest.raises(SystemExit):
        run_pretrain(**{**small, "output_dir": tmp_path / "cut", **streamed})
    recipe.StopRequest.agreed = original
    run_pretrain(**{**small, "output_dir": tmp_path / "cut", **streamed})
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_stream_needs_to_know_when_to_stop(run_pretrain, small, tmp_path):
    del small["max_steps"]
    with pytest.raises(ValueError, match="give --max_steps"):
        run_pretrain(**{**small, "output_dir": tmp_path / "out", "streaming": True})


@pytest.mark.fault(12)
def test_a_spike_is_not_followed(run_pretrain, small, tmp_path, monkeypatch):
    recipe = run_pretrain.recipe
    judged = []

    def is_spike(self, loss, grad_norm):
        judged.append((loss, grad_norm))
        return len(judged) == 3

    monkeypatch.setattr(recipe.SpikeDetector, "is_spike", is_spike)
    run_pretrain(
        **{
            **small,
            "output_dir": tmp_path / "out",
            "max_steps": 3,
            "save_steps": 1,
            "save_total_limit": 3,
            "skip_spikes": 6.0,
        }
    )
    second, third = (
        load_file(tmp_path / "out" / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (2, 3)
    )
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["skipped_updates"] == 1
    logged = read_log(tmp_path / "out" / "log.jsonl")[-1]
    assert judged[-1][1] == pytest.approx(logged["grad_norm"])
