"""The instruction recipe, run in this process on a model and conversations small enough for seconds."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

import hfllm
from hfllm.cli.arguments import parse_arguments
from hfllm.data.conversations import prompt_key
from hfllm.data.python_questions import python_questions
from hfllm.evaluation.replies import Reply
from tests.conftest import make_tiny_config
from tests.recipes.conftest import RECIPES, load_recipe


recipe = load_recipe("finetune_instruction")

NAMES = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo"]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    """An untrained GPT with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = hfllm.train_bpe(topics.values(), 400)
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "max_position_embeddings": 64}
    hfllm.GPTForCausalLM(make_tiny_config("modern", **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def greetings(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "greetings.json"
    rows = [
        {"instruction": f"Greet {name}", "input": hour, "output": f"Good {hour}"}
        for name in NAMES
        for hour in ("day", "night")
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def _leave_no_accelerator_behind():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def options(base_model, greetings, tmp_path) -> dict:
    return {
        "model": base_model,
        "dataset": greetings,
        "output_dir": tmp_path / "out",
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 2,
        "num_samples": 2,
        "max_new_tokens": 8,
        "learning_rate": 1e-2,
    }


def run(**options) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    recipe.main(parse_arguments(recipe.InstructionArguments, [f"--{name}={value}" for name, value in options.items()]))
    return json.loads((Path(options["output_dir"]) / "metrics.json").read_text())


def log_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(base_model, greetings, tmp_path_factory) -> tuple[Path, dict, str]:
    """A model that has learned the greetings by LoRA: its folder, its numbers, and what the run printed."""
    output_dir = tmp_path_factory.mktemp("tuned") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = run(
            model=base_model,
            dataset=greetings,
            output_dir=output_dir,
            validation_fraction=0.2,
            test_fraction=0.2,
            per_device_train_batch_size=2,
            max_steps=100,
            eval_steps=50,
            num_samples=4,
            max_new_tokens=8,
            learning_rate=2e-2,
            check_answers=True,
        )
    return output_dir, metrics, printed.getvalue()


def test_the_model_learns_to_answer_and_to_stop(tuned):
    output_dir, metrics, _ = tuned
    assert metrics["eval_loss"] < 0.3 < 3 < metrics["eval_loss_before"]
    assert metrics["test_loss"] < 0.3 < 3 < metrics["test_loss_before"]
    assert metrics["test_exact_match"] == 1
    chat = pipeline("text-generation", str(output_dir))
    reply = chat([{"role": "user", "content": "Greet Zoe\n\nnight"}], max_new_tokens=20, do_sample=False)
    assert reply[0]["generated_text"][-1] == {"role": "assistant", "content": "Good night"}
    ends = AutoModelForCausalLM.from_pretrained(output_dir).generation_config.eos_token_id
    assert ends == AutoTokenizer.from_pretrained(output_dir).convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_before_training_it_shows_what_is_learned_and_afterwards_what_changed(tuned):
    output_dir, metrics, printed = tuned
    assert "<|im_start|>assistant\n>>Good " in printed
    assert "are learned (" in printed and "0.0% empty" not in printed
    assert "Exact match on 5 of 5 test questions, none of which was in training: 100.0%. " in printed
    assert f"{metrics['test_answers_unfinished']} replies had no end after --max_new_tokens 8, 0 were empty" in printed
    assert metrics["test_answers_unfinished"] == 4  # "Good night" is as many tokens of this tokenizer, without its end
    assert "response token (prompts do not count)" in printed
    assert "The model learned: the test loss fell from " in printed
    assert "A test question that it answers correctly:\n    Greet " in printed
    samples = (output_dir / "samples.txt").read_text()
    assert samples.count("before:") == samples.count("after:    Good") == 4
    assert all(len(line) < 220 for line in samples.splitlines())
    assert metrics["train_padding_share"] < 0.1
    assert metrics["train_learned_tokens"] < metrics["train_tokens"] / 2
    assert {"eval_loss", "loss", "learning_rate", "grad_norm"} <= {name for line in log_of(output_dir) for name in line}
    assert yaml.safe_load((output_dir / "arguments.yaml").read_text())["learning_rate"] == 2e-2


def test_the_adapter_on_the_base_is_the_merged_model(tuned, base_model):
    output_dir, _, _ = tuned
    ids = torch.arange(5, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(output_dir).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), output_dir / "adapter").eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.use_cache


def test_the_test_loss_is_that_of_the_responses_alone(tuned, base_model, greetings):
    """By hand: each conversation alone, no packing, the tokens after the assistant's header."""
    _, metrics, _ = tuned
    args = parse_arguments(
        recipe.InstructionArguments, [f"--dataset={greetings}", "--validation_fraction=0.2", "--test_fraction=0.2"]
    )
    test = recipe.load_data(args)[0]["test"]
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    losses = []
    for conversation in test:
        prompt = tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True)["input_ids"]
        response = tokenizer.encode(conversation.messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    assert metrics["test_loss_before"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(options, tmp_path):
    """Rows have different numbers of learned tokens, so a mean of means would be another number."""
    logs = []
    for rows, accumulation in ((4, 1), (2, 2), (1, 4)):
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        run(**{**options, **cut, "max_steps": 3, "packing": False, "output_dir": tmp_path / f"{rows}"})
        logs.append([line for line in log_of(tmp_path / f"{rows}") if "loss" in line])
    for log in logs[1:]:
        assert len(log) == 3
        # The first batch is the same; grouping by length then draws from other megabatches.
        assert log[0]["loss"] == pytest.approx(logs[0][0]["loss"], abs=1e-4)
        assert log[0]["grad_norm"] == pytest.approx(logs[0][0]["grad_norm"], rel=1e-3)


def test_a_finished_run_is_left_alone_and_another_one_is_refused(options, capsys):
    run(**options)
    written = (Path(options["output_dir"]) / "model.safetensors").stat().st_mtime_ns
    run(**options)
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert (Path(options["output_dir"]) / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"belongs to another run:\n    learning_rate was 0.01 and is 0.02\n"):
        run(**{**options, "learning_rate": 0.02})


def test_an_interrupted_run_resumes_exactly(options, tmp_path):
    whole = run(**{**options, "output_dir": tmp_path / "whole"})
    interrupted = {**options, "output_dir": tmp_path / "interrupted", "save_steps": 2, "save_total_limit": 2}
    run(**interrupted)
    (tmp_path / "interrupted" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "interrupted" / "checkpoints" / "checkpoint-4")
    resumed = run(**interrupted)
    assert [line["step"] for line in log_of(tmp_path / "interrupted") if "loss" in line] == [1, 2, 3, 4, 3, 4]
    assert resumed["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-6)


@pytest.mark.parametrize("method", [{"lora_dropout": 0.2}, {"method": "full"}, {"method": "full", "optimizer": "muon"}])
def test_the_same_command_gives_the_same_weights_to_the_bit(method, options, tmp_path):
    weights = []
    for folder in ("once", "again"):
        metrics = run(**{**options, **method, "output_dir": tmp_path / folder})
        assert metrics["eval_loss"] < metrics["eval_loss_before"]
        weights.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_further_questions_change_neither_validation_nor_test_and_are_none_of_theirs():
    words = ["--dataset=stdlib", "--validation_fraction=0.02", "--test_fraction=0.07"]

    def load(*more):
        words.extend(more)
        sides, description = recipe.load_data(parse_arguments(recipe.InstructionArguments, words))
        return sides.pop("train"), sides, description

    few, held_back, _ = load()
    many, still_held_back, description = load("--num_further_questions=3000")
    assert held_back == still_held_back and many[: len(few)] == few
    reworded, held_back_too, _ = load("--reword_questions=true")
    assert held_back == held_back_too and reworded != many
    assert [row.messages[1:] for row in reworded] == [row.messages[1:] for row in many]
    joined, held_back_still, _ = load("--max_turns=4")
    assert held_back == held_back_still and len(joined) < len(many) / 2
    assert sum(len(row.messages) for row in joined) == sum(len(row.messages) for row in many)
    assert len(many) == len(few) + 3000 and "3,000 further expressions" in description
    keys = [{prompt_key(conversation) for conversation in side} for side in (many, *held_back.values())]
    assert len(keys[0]) == len(many) and not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_on_stdlib_questions_are_also_asked_in_other_words_and_as_a_second_turn(options, monkeypatch):
    questions = [each for each in python_questions(120) if each.kind not in ("docstring", "name")]
    monkeypatch.setattr("hfllm.data.conversations.python_questions", lambda seed: questions)
    asked = []

    def reply_rightly_in_other_words(model, tokenizer, prompts, **_):
        asked.append(prompts)
        known = [prompt.messages[-2]["content"].startswith("What does Python") for prompt in prompts]
        return [Reply("?" if each else prompt.messages[-1]["content"], True) for each, prompt in zip(known, prompts)]

    monkeypatch.setattr(recipe, "answer", reply_rightly_in_other_words)
    few = {"dataset": "stdlib", "test_fraction": 0.3, "max_steps": 1, "num_samples": 1}
    metrics = run(**{**options, **few}, reword_questions=True, max_turns=2)
    _, plain, reworded, second, _ = asked
    assert 0 < len(reworded) < len(plain) == len(second) == metrics["test_answers"]
    first_words = {prompt.messages[0]["content"] for prompt in plain}
    assert not first_words & {prompt.messages[0]["content"] for prompt in reworded}
    assert metrics["test_exact_match_reworded"] > 0.5 and metrics["test_exact_match"] < 0.5
    assert all(len(prompt.messages) == 4 and prompt.messages[2]["content"] in first_words for prompt in second)


def test_validation_and_test_of_ones_own_are_measured_and_several_told_apart(options, tmp_path):
    for name in ("fr", "uk", "end"):
        rows = [{"instruction": f"{name} {n}", "output": f"{name}!"} for n in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    given = {"validation_dataset": f"{tmp_path}/fr.json,{tmp_path}/uk.json", "test_dataset": f"{tmp_path}/end.json"}
    metrics = run(**options, **given)
    losses = [metrics["eval_loss_fr"], metrics["eval_loss_uk"]]
    assert min(losses) < metrics["eval_loss"] < max(losses) and "test_loss_end" not in metrics
    args = parse_arguments(
        recipe.InstructionArguments, [f"--{name}={value}" for name, value in (options | given).items()]
    )
    sides, description = recipe.load_data(args)
    assert {name: len(side) for name, side in sides.items()} == {
        "train": 2 * len(NAMES),
        "eval": 6,
        "test": 3,
        "eval_fr": 3,
        "eval_uk": 3,
    }
    assert "begin with a prompt of training" not in description


def test_all_weights_can_be_trained(options):
    metrics = run(**options, method="full", packing=False)
    assert metrics["num_trained_parameters"] == metrics["num_parameters"]
    assert not (options["output_dir"] / "adapter").exists()
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_loras_rate_is_its_own_and_not_that_of_full_fine_tuning(options):
    """The book trains all weights with 5e-5, and LoRA with up to 8e-4: with the rate of all weights it hardly moves."""
    del options["learning_rate"]
    for method, rate in (("lora", 5e-4), ("full", 5e-5)):
        folder = options["output_dir"] / method
        run(**{**options, "output_dir": folder, "method": method, "max_steps": 1, "lr_scheduler_type": "constant"})
        assert [line["learning_rate"] for line in log_of(folder) if "learning_rate" in line] == [rate]


def test_the_best_checkpoint_on_validation_is_kept_and_a_run_stops_early_if_asked(options, tmp_path, monkeypatch):
    """By losses that are lowest after step 3: the weights are then those of a run of three steps."""
    monkeypatch.setattr(recipe, "response_loss", lambda trainer, rows: 2.0 + abs(trainer.state.global_step - 3))
    options = {**options, "lr_scheduler_type": "constant", "max_steps": 8, "eval_steps": 1, "save_total_limit": 9}

    def weights(name: str) -> bytes:
        return (tmp_path / name / "model.safetensors").read_bytes()

    kept = run(**{**options, "output_dir": tmp_path / "kept"})
    last = run(**{**options, "output_dir": tmp_path / "last"}, load_best_model_at_end=False)
    run(**{**options, "output_dir": tmp_path / "three", "max_steps": 3}, load_best_model_at_end=False)
    assert (kept["best_checkpoint"], last["best_checkpoint"]) == ("checkpoint-3", None)
    assert kept["train_steps"] == last["train_steps"] == 8
    assert weights("kept") == weights("three") != weights("last")

    patient = {**options, "output_dir": tmp_path / "patient", "early_stopping_patience": 2}
    assert run(**patient)["train_steps"] == 5
    assert weights("patient") == weights("kept")
    (tmp_path / "patient" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "patient" / "checkpoints" / "checkpoint-5")
    assert run(**patient)["train_steps"] == 5  # a resumed run remembers that one evaluation was no gain


def test_without_a_number_of_epochs_small_data_is_repeated(options):
    """Few rows are passed over twenty times, and evaluated ten times."""
    del options["max_steps"], options["eval_steps"]
    metrics = run(**options)
    steps_per_epoch = -(-metrics["train_rows"] // 2)
    assert 20 * steps_per_epoch < 150
    assert metrics["train_steps"] == 20 * steps_per_epoch and metrics["epochs"] == 20
    evaluated = [line["step"] for line in log_of(options["output_dir"]) if "eval_loss" in line]
    assert evaluated == list(range(2 * steps_per_epoch, metrics["train_steps"] + 1, 2 * steps_per_epoch))


def test_gradient_checkpointing_learns_through_frozen_embeddings(options):
    metrics = run(**options, gradient_checkpointing=True)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def gpt2_tokenizer(book_data: Path, folder: Path, num_merges: int):
    """GPT-2's own tokenizer with its first merges alone, so that a model of its size takes no seconds."""
    folder.mkdir()
    merges = (book_data / "gpt2_merges.txt").read_text(encoding="utf-8").removeprefix("#version: 0.2\n").splitlines()
    merges = merges[:num_merges]
    vocabulary = json.loads((book_data / "gpt2_vocab.json").read_text(encoding="utf-8"))
    tokens = dict.fromkeys(sorted(vocabulary, key=vocabulary.get)[:256])
    tokens |= dict.fromkeys([merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"])
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return hfllm.tokenization.load_tokenizer(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_model_of_others_without_a_chat_template_learns_to_chat(family, request, options, tmp_path, capsys):
    """From transformers' own class into the chat and the evaluation, merged and as an adapter on its base."""
    torch.manual_seed(0)
    if family == "gpt2":
        tokenizer = gpt2_tokenizer(request.getfixturevalue("book_data"), tmp_path / "tokenizer", num_merges=600)
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, vocab_size=len(tokenizer)))
    else:
        tokenizer = hfllm.train_bpe(topics.values(), 400)
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = LlamaForCausalLM(
            LlamaConfig(**sizes, **ids, vocab_size=400, max_position_embeddings=128, initializer_range=0.2)
        )
    tokenizer.chat_template = None
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    run_options = {**options, "model": base, "max_steps": 50, "eval_steps": 50, "learning_rate": 2e-2}
    with pytest.raises(ValueError, match=r"no chat template.*--chat_template alpaca"):
        run(**run_options)
    assert not options["output_dir"].exists()

    metrics = run(**run_options, chat_template="alpaca", check_answers=True)
    assert "by the chat template 'alpaca', as the tokenizer had none" in capsys.readouterr().out
    assert metrics["test_exact_match"] > 0.5 and metrics["test_loss"] < 1 < 3 < metrics["test_loss_before"]

    held_out = tmp_path / "test.jsonl"
    args = [f"--{name}={options[name]}" for name in ("dataset", "validation_fraction", "test_fraction")]
    test = recipe.load_data(parse_arguments(recipe.InstructionArguments, args))[0]["test"]
    held_out.write_text("".join(json.dumps({"messages": each.messages}) + "\n" for each in test))

    chat, evaluate = load_recipe("chat"), load_recipe("evaluate_model")
    output_dir = options["output_dir"]
    outsider = pipeline("text-generation", str(output_dir))
    question = "Greet Zoe good night"
    said = outsider([{"role": "user", "content": question}], max_new_tokens=9, do_sample=False)[0]["generated_text"]
    assert said[-1]["content"].startswith("Good")
    for way in ([f"--model={output_dir}"], [f"--model={base}", f"--adapter={output_dir / 'adapter'}"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
            capsys.readouterr()
            chat.main(parse_arguments(chat.ChatArguments, [*way, "--max_new_tokens=9"]))
        assert capsys.readouterr().out == f"{said[-1]['content'].strip()}\n"

        AcceleratorState._reset_state(reset_partial_state=True)
        words = [f"--dataset={held_out}", "--conversations", "--check_answers", f"--output_dir={tmp_path / 'numbers'}"]
        evaluate.main(parse_arguments(evaluate.EvaluateArguments, [*words, *way]))
        numbers = json.loads((tmp_path / "numbers" / "metrics.json").read_text())
        [numbers] = numbers.values() if "test_loss" not in numbers else [numbers]
        assert numbers["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-4)
        assert numbers["test_exact_match"] == metrics["test_exact_match"]


def test_impossible_options_are_refused_at_the_start(options, base_model, tmp_path):
    with pytest.raises(ValueError, match="is model itself, which would be overwritten"):
        run(**{**options, "output_dir": base_model})
    with pytest.raises(ValueError, match="block_size=65 is longer than the model's context of 64"):
        run(**{**options, "block_size": 65})
    with pytest.raises(ValueError, match="Nothing is left to learn"):
        run(**{**options, "block_size": 4})
    with pytest.raises(ValueError, match="--column_map"):
        run(**{**options, "column_map": "question"})
    with pytest.raises(ValueError, match="test_fraction"):
        run(**{**options, "test_fraction": 0})
    with pytest.raises(ValueError, match="--optimizer muon updates whole weight matrices"):
        run(**options, optimizer="muon")
    with pytest.raises(ValueError, match="--num_further_questions: only --dataset stdlib"):
        run(**options, num_further_questions=9)
    with pytest.raises(ValueError, match="--reword_questions: only questions of --dataset stdlib"):
        run(**options, reword_questions=True)
    with pytest.raises(ValueError, match="--max_turns 0: give at least 1"):
        run(**options, max_turns=0)


@pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("instruction_*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_one_of_this_recipe(config):
    parse_arguments(recipe.InstructionArguments, [f"--config={config}"]).check()


@pytest.mark.slow
def test_the_books_instructions_are_learned_end_to_end(book_data, tmp_path):
    """1,100 rows, the small config, a model of random weights: the loss on responses falls."""
    tokenizer = hfllm.train_bpe([(book_data / "instruction-data.json").read_text()], 1024)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "max_position_embeddings": 256}
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", **sizes, initializer_range=0.05))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    metrics = run(
        config=RECIPES / "configs" / "instruction_book.yaml",
        model=tmp_path / "base",
        dataset=book_data / "instruction-data.json",
        output_dir=tmp_path / "out",
        method="full",
        learning_rate=3e-3,
        max_new_tokens=16,
    )
    assert metrics["train_conversations"] == 935
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 2
    assert metrics["test_loss"] < metrics["test_loss_before"] - 2
    assert metrics["train_padding_share"] < 0.1
