"""DPO on pairs of replies: the policy learns the shown preference, and starts as its own reference."""

import json
import math
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfllm
from hfllm.cli.arguments import parse_arguments
from hfllm.data.conversations import as_preference, load_preferences
from tests.conftest import make_tiny_config
from tests.recipes.conftest import load_recipe


recipe = load_recipe("finetune_preference")

WORDS = ["up", "left", "out", "here", "down", "right", "in", "there", "back", "on", "home", "away"]


@pytest.fixture
def preferences(tmp_path) -> Path:
    rows = [
        {"prompt": f"Should I go {word}?", "chosen": f"Yes, go {word}.", "rejected": "No, that is not allowed."}
        for word in WORDS
    ]
    path = tmp_path / "preferences.json"
    path.write_text(json.dumps(rows))
    return path


def test_texts_and_messages_are_the_same_preference():
    texts = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    question = [{"role": "user", "content": "Q"}]
    whole = {
        "prompt": question,
        "chosen": [*question, {"role": "assistant", "content": "A"}],
        "rejected": [{"role": "assistant", "content": "B"}],
    }
    assert as_preference(texts) == as_preference(whole)
    assert as_preference(texts)["chosen"] == [{"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "A"}, r"there is no rejected among the columns \['prompt', 'chosen'\]"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "nothing is preferred"),
        ({"prompt": "Q", "chosen": "", "rejected": "A"}, "chosen: the response in message 2 is empty"),
        ({"prompt": [{"role": "assistant", "content": "Q"}], "chosen": "A", "rejected": "B"}, "out of order"),
        ({"prompt": "Q", "chosen": 3, "rejected": "B"}, "'chosen' is a number, not a text"),
        ({"prompt": "Q", "chosen": None, "rejected": "B"}, "line 1: its 'chosen' is null"),
        ({"prompt": None, "chosen": "A", "rejected": "B"}, "line 1: its 'prompt' is null"),
        ({"prompt": 5, "chosen": "A", "rejected": "B"}, "'prompt' is a number, not a text"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [{"name": "x"}]}, "it has 'tools'"),
    ],
)
def test_a_row_that_is_not_a_preference_says_why(row, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message):
        load_preferences(str(path), validation_fraction=0.1, seed=0)


def test_bad_preferences_are_counted_under_skip(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(4)]
    rows = [*good, {**good[0], "chosen": None}, {**good[0], "prompt": 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training, sides, account = load_preferences(str(path), on_bad_record="skip", validation_fraction=0.25, seed=0)
    assert (len(training), len(sides["eval"]), account) == (3, 1, {"rows": 4, "bad_records": 2})


def test_system_input_and_history_go_into_the_prompt_of_a_preference():
    row = {"prompt": "Add", "input": "1 and 2", "chosen": "3", "rejected": "4", "system": "Be right"}
    system, question = {"role": "system", "content": "Be right"}, {"role": "user", "content": "Add\n\n1 and 2"}
    assert as_preference(row)["prompt"] == [system, question]
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert as_preference({**row, "history": [["Hello", "Hi"]]})["prompt"] == [system, *before, question]
    repeated = [question, {"role": "assistant", "content": "3"}]
    assert as_preference({**row, "prompt": [question], "chosen": repeated})["chosen"] == repeated[1:]


def test_preferences_of_ones_own_validate(tmp_path, caplog):
    rows = [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(5)]
    (tmp_path / "train.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "own.json").write_text(json.dumps(rows[3:]))
    options = {"validation_dataset": str(tmp_path / "own.json"), "validation_fraction": 0.5, "seed": 0}
    training, sides, _ = load_preferences(str(tmp_path / "train.json"), **options)
    assert [row["prompt"][0]["content"] for row in training] == ["Q0", "Q1", "Q2", "Q3"]
    questions = {side: [row["prompt"][0]["content"] for row in rows] for side, rows in sides.items()}
    assert questions == {"eval": ["Q3", "Q4"]}
    assert "1 of the pairs to validate have a prompt that is trained on" in caplog.text


def test_several_preferences_of_ones_own_are_told_apart_by_their_names(tmp_path):
    rows = [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(5)]
    for name, part in (("train", rows[:2]), ("fr", rows[2:4]), ("before", rows[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    own = f"{tmp_path / 'fr.json'},{tmp_path / 'before.json'}"
    _, sides, _ = load_preferences(
        str(tmp_path / "train.json"), validation_dataset=own, validation_fraction=0.5, seed=0
    )
    # "eval_loss_before" is the loss before training, so the file before.json has another name.
    assert {side: [row["prompt"][0]["content"] for row in part] for side, part in sides.items()} == {
        "eval": ["Q2", "Q3", "Q4"],
        "eval_fr": ["Q2", "Q3"],
        "eval_before_2": ["Q4"],
    }
    with pytest.raises(ValueError, match="The dataset ',' has no name"):
        load_preferences(str(tmp_path / "train.json"), validation_dataset=",", validation_fraction=0.5, seed=0)


@pytest.fixture
def options(preferences, tmp_path) -> dict:
    """Options of a run of seconds, on a base that it makes."""
    pytest.importorskip("trl")
    tokenizer = hfllm.train_bpe(topics.values(), 400)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hfllm.GPTForCausalLM(
        make_tiny_config("modern", vocab_size=400, max_position_embeddings=128, **ids)
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {
        "model": tmp_path / "base",
        "dataset": preferences,
        "output_dir": tmp_path / "out",
        "validation_fraction": 0.25,
        "max_steps": 30,
        "learning_rate": 5e-3,
        "logging_steps": 1,
    }


def run(**options) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe.main(parse_arguments(recipe.PreferenceArguments, [f"--{name}={value}" for name, value in options.items()]))
    return json.loads((Path(options["output_dir"]) / "metrics.json").read_text())


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(options, tmp_path, capsys):
    whole = run(**{**options, "max_steps": 6, "output_dir": tmp_path / "whole"})
    interrupted = {**options, "max_steps": 6, "save_steps": 2, "save_total_limit": 3}
    run(**interrupted)
    (tmp_path / "out" / "metrics.json").unlink()
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-6")
    resumed = run(**interrupted)
    steps = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert resumed == pytest.approx(whole, abs=1e-6)
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "out")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5)

    capsys.readouterr()
    run(**interrupted)
    assert "is finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"belongs to another run:\n    beta was 0.1 and is 0.2\n"):
        run(**interrupted, beta=0.2)


@pytest.mark.slow
def test_each_of_several_validation_datasets_is_measured(options, preferences, tmp_path):
    rows = json.loads(preferences.read_text())
    turned = {"chosen": "No, that is not allowed.", "rejected": "Yes, go there."}
    (tmp_path / "same.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "turned.json").write_text(json.dumps([{**row, **turned} for row in rows[:4]]))
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 10}  # so few that none is far off
    own = f"{tmp_path / 'same.json'},{tmp_path / 'turned.json'}"
    metrics = run(**options, validation_dataset=own)
    assert metrics["eval_reward_accuracy_same"] == 1 and metrics["eval_reward_accuracy_turned"] == 0
    assert metrics["eval_loss_same"] < math.log(2) < metrics["eval_loss_turned"]
    for name in ("eval_loss", "eval_reward_margin"):
        assert metrics[name] == pytest.approx((metrics[f"{name}_same"] + metrics[f"{name}_turned"]) / 2, abs=1e-5)


@pytest.mark.slow
def test_the_model_comes_to_prefer_what_it_is_shown(options, preferences, tmp_path):
    metrics = run(**options)
    assert metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-4)  # eq. 7: the policy is the reference
    assert metrics["eval_reward_margin_before"] == pytest.approx(0, abs=1e-4)
    assert metrics["eval_reward_margin"] > 0.5 and metrics["eval_loss"] < 0.5
    assert metrics["eval_reward_accuracy"] == 1
    assert "reward" in (tmp_path / "out" / "report.html").read_text()
    assert "validation reward accuracy | 100.0%" in (tmp_path / "out" / "README.md").read_text()

    # By hand, on the saved folders: the margin is beta times the difference of the log-ratios.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    @torch.no_grad()
    def log_probability(model, prompt, reply) -> float:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*prompt, *reply])["input_ids"]
        logits = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
        return logits.gather(-1, torch.tensor(whole[len(before) :])[:, None]).sum().item()

    _, held_out, _ = load_preferences(str(preferences), validation_fraction=0.25, seed=42)
    margins = []
    for row in held_out["eval"]:
        gains = [
            log_probability(policy, row["prompt"], row[side]) - log_probability(base, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        ]
        margins.append(0.1 * (gains[0] - gains[1]))
    assert sum(margins) / len(margins) == pytest.approx(metrics["eval_reward_margin"], abs=1e-3)

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out/adapter"
    )
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(policy(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
