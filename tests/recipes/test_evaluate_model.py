"""recipes/evaluate_model.py: numbers checked by hand, models side by side, and what it refuses."""

import json
import math

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

import hfllm
from hfllm.cli.arguments import parse_arguments
from hfllm.runs.lock import run_lock
from hfllm.tokenization import load_tokenizer
from tests.conftest import make_tiny_config
from tests.distributed.launching import command
from tests.distributed.launching import run as launch
from tests.recipes.conftest import load_recipe, make_sentences


TEXTS = [*make_sentences(6, seed=1), "an ümlaut, and <|endoftext|> as text"]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("evaluate_model")


@pytest.fixture
def evaluate(recipe, tmp_path, capsys):
    """Run the recipe on options; returns what it printed."""

    def run(*options) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        main_options = [str(option) for option in options]
        recipe.main(parse_arguments(recipe.EvaluateArguments, [*main_options, "--cache_dir", str(tmp_path / "cache")]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def save_model(tmp_path, tokenizer_folder):
    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def build(preset="modern", **fields):
    torch.manual_seed(1)
    return hfllm.GPTForCausalLM(make_tiny_config(preset, vocab_size=300, **fields)).eval()


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def nats_by_hand(model, tokenizer, text: str, block_size: int) -> tuple[float, int]:
    ids, total, done = tokenizer.backend_tokenizer, 0.0, 0
    ids.encode_special_tokens = True
    ids = ids.encode(text, add_special_tokens=False).ids
    sequence = [tokenizer.bos_token_id, *ids]
    while done < len(ids):
        end = min(len(ids), done + block_size)
        with torch.no_grad():
            logits = model(torch.tensor([sequence[max(0, end - block_size) : end]])).logits[0].double()
        rows = logits.log_softmax(-1)[-(end - done) :]
        total -= sum(row[target].item() for row, target in zip(rows, sequence[done + 1 : end + 1], strict=True))
        done = end
    return total, len(ids)


def test_the_numbers_are_those_of_a_sum_by_hand_and_stand_beside_those_of_training(
    evaluate, save_model, text, tokenizer_folder
):
    model = build()
    folder = save_model(model)
    (folder / "metrics.json").write_text('{"eval_loss": 1.5, "test_loss": 7.0}')
    printed = evaluate("--model", folder, "--dataset", text, "--block_size", 16)

    sums = [nats_by_hand(model, load_tokenizer(tokenizer_folder), document, 16) for document in TEXTS]
    nats, num_tokens = sum(nats for nats, _ in sums), sum(count for _, count in sums)
    num_bytes = sum(len(document.encode()) for document in TEXTS)
    found = metrics_of(folder)
    assert found["test_tokens"] == num_tokens and found["test_bytes"] == num_bytes
    assert found["test_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert found["test_perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-6)
    assert found["eval_loss"] == 1.5 and found["test_loss"] == 7.0, "training's"
    assert found["evaluate_test_loss"] == pytest.approx(nats / num_tokens, rel=1e-6)
    assert "test_loss already" in printed and "test_bits_per_byte" in printed

    evaluate("--model", folder, "--dataset", text, "--block_size", 16, "--stride", 4, "--per_device_eval_batch_size", 3)
    again = metrics_of(folder)
    assert again["test_tokens"] == num_tokens and again["test_stride"] == 4
    assert again["test_bits_per_byte"] != found["test_bits_per_byte"], "its own numbers are written again"
    assert again["test_loss"] == 7.0


def test_a_folder_that_cannot_take_the_numbers_is_refused_before_they_are_measured(
    evaluate, recipe, save_model, text, tmp_path, monkeypatch
):
    folder = save_model(build())
    monkeypatch.setattr(recipe, "score", None)
    (folder / "metrics.json").write_text("{half")
    with pytest.raises(ValueError, match="not a JSON object"):
        evaluate("--model", folder, "--dataset", text)
    with pytest.raises(ValueError, match=r"is a file\. Give the path of a folder"):
        evaluate("--model", folder, "--dataset", text, "--output_dir", text)


def test_numbers_of_a_folder_in_which_a_run_works_are_printed_only(evaluate, save_model, text):
    folder = save_model(build())
    with run_lock(folder):
        printed = evaluate("--model", folder, "--dataset", text)
    assert "are only printed: Another run is using" in printed and "test_bits_per_byte" in printed
    assert not (folder / "metrics.json").exists()


def test_a_file_whose_name_has_a_comma_is_one_file(evaluate, save_model, text, tmp_path):
    folder = save_model(build())
    text.rename(tmp_path / "a, b.jsonl")
    evaluate("--model", folder, "--dataset", tmp_path / "a, b.jsonl")
    assert metrics_of(folder)["test_documents"] == len(TEXTS)


def test_the_card_and_the_page_of_a_run_tell_the_new_numbers(evaluate, save_model, text):
    folder = save_model(build())
    evaluate("--model", folder, "--dataset", text, "--block_size", 16)
    assert not (folder / "README.md").exists(), "a folder that is no run gets neither"
    (folder / "arguments.yaml").write_text("dataset: stdlib\n")
    evaluate("--model", folder, "--dataset", text, "--block_size", 16)
    shown = f"{metrics_of(folder)['test_bits_per_byte']:.4f}"
    assert shown in (folder / "README.md").read_text() and shown in (folder / "report.html").read_text()


def test_a_native_gpt2_and_its_twin_have_the_same_numbers_in_one_table(evaluate, save_model, text, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    native = save_model(GPT2LMHeadModel(config), "native")
    twin = save_model(hfllm.from_native(str(native)), "twin")
    printed = evaluate("--model", native, twin, "--dataset", text, "--output_dir", tmp_path / "numbers")
    one, other = (metrics_of(tmp_path / "numbers" / name) for name in ("native", "twin"))
    assert one["test_bits_per_byte"] == pytest.approx(other["test_bits_per_byte"], rel=1e-6)
    [line] = [line for line in printed.splitlines() if line.startswith("test_bits_per_byte")]
    assert line.split()[1] == line.split()[2] == f"{one['test_bits_per_byte']:.6g}"


def test_an_adapter_changes_the_numbers_and_one_for_another_base_is_refused(evaluate, save_model, text, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    base = save_model(build(), "base")
    evaluate("--model", base, "--dataset", text)
    evaluate("--model", base, "--adapter", tmp_path / "adapter", "--dataset", text)
    assert metrics_of(tmp_path / "adapter")["test_loss"] != metrics_of(base)["test_loss"]

    other = save_model(build(hidden_size=64), "other")
    with pytest.raises(ValueError, match="belongs to another base"):
        evaluate("--model", other, "--adapter", tmp_path / "adapter", "--dataset", text)
    with pytest.raises(ValueError, match="adapter that does not name its base"):
        evaluate("--model", tmp_path / "adapter", "--dataset", text)


def test_what_cannot_be_measured_says_so(evaluate, save_model, text, tmp_path):
    folder = save_model(build())
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    (tmp_path / "nothing").mkdir()
    classifier = save_model(hfllm.GPTForSequenceClassification(make_tiny_config("book", vocab_size=300)), "classifier")
    for options, words in [
        (["--model", folder], "give --dataset, --tasks or both"),
        (["--model", tmp_path / "nothing", "--dataset", text], "without a config.json"),
        (["--model", tmp_path / "absent", "--dataset", text], "neither a folder nor a model"),
        (["--model", classifier, "--dataset", text], "no column 'label'"),
        (["--model", classifier, "--dataset", text, "--conversations"], "--conversations: for causal models"),
        (["--model", classifier, "--dataset", text, "--stride", 4], "is for windows: give --long_texts window"),
        (["--model", classifier, "--dataset", "stdlib"], "trained on most of its docstrings"),
        (["--model", folder, classifier, "--dataset", text], "these are of two.*classifier is a classifier model"),
        (["--model", folder, "--dataset", text, "--label_column", "kind"], "is for classifiers"),
        (["--model", folder, "--dataset", text, "--check_answers"], "give --conversations"),
        (["--model", folder, "--dataset", text, "--conversations"], "fit no known form"),
        (["--model", folder, "--dataset", "stdlib", "--conversations"], "held back from training"),
        (["--model", folder, "--dataset", text, "--conversations", "--stride", 2], "scored whole"),
        (["--model", folder, "--dataset", empty], "has no text"),
        (["--model", folder, "--dataset", text, "--block_size", 8, "--stride", 9], "tokens would be left out"),
        (["--model", folder, "--dataset", text, "--split", "validation"], "is local and read whole"),
        (["--model", folder, "--dataset", text, "--stride", 33], "tokens would be left out"),
        (["--model", folder, "--dataset", text, "--block_size", 33], "more than the model's context"),
        (["--model", folder, "--dataset", text, "--adapter", tmp_path / "nothing"], "not a PEFT adapter"),
        (["--model", folder, folder, "--dataset", text, "--output_dir", tmp_path], "a folder for each model"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate(*options)


LABELS = ["bird", "cat", "fish"]


def build_classifier(seed=0):
    config = make_tiny_config("modern", vocab_size=300, initializer_range=0.3)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: index for index, label in enumerate(LABELS)}
    torch.manual_seed(seed)
    return hfllm.GPTForSequenceClassification(config).eval()


def write_labelled(path, labels=("cat", "fish", "cat", "bird", "cat", "fish", "fish")):
    rows = [{"message": message, "kind": label} for message, label in zip(TEXTS, labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_a_classifiers_numbers_are_those_of_a_count_by_hand_and_two_stand_side_by_side(
    evaluate, save_model, tmp_path, tokenizer_folder
):
    model, data = build_classifier(), tmp_path / "test.jsonl"
    rows = write_labelled(data)
    one, other = save_model(model, "one"), save_model(build_classifier(seed=3), "other")
    options = ["--dataset", data, "--text_column", "message", "--label_column", "kind"]
    printed = evaluate("--model", one, other, *options, "--per_device_eval_batch_size", 3)

    tokenizer, said, nats, confidences = load_tokenizer(tokenizer_folder), [], 0.0, []
    tokenizer.split_special_tokens = True
    for row in rows:  # a text at a time, without padding
        ids = tokenizer(row["message"])["input_ids"][: model.config.max_position_embeddings]
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].double().softmax(-1)
        said.append(LABELS[int(probabilities.argmax())])
        confidences.append(float(probabilities.max()))
        nats -= math.log(probabilities[LABELS.index(row["kind"])])
    right = [word == row["kind"] for word, row in zip(said, rows)]
    f1 = []
    for label in LABELS:
        hits = sum(word == row["kind"] == label for word, row in zip(said, rows))
        total = said.count(label) + sum(row["kind"] == label for row in rows)
        f1 += [2 * hits / total] if total else []
    gaps = {}
    for confidence, is_right in zip(confidences, right):
        gaps[int(confidence * 10)] = gaps.get(int(confidence * 10), 0) + confidence - is_right
    found = metrics_of(one)
    assert found["test_texts"] == 7
    assert found["test_accuracy"] == pytest.approx(sum(right) / 7)
    assert found["test_f1_macro"] == pytest.approx(sum(f1) / len(f1))
    assert found["test_loss"] == pytest.approx(nats / 7, rel=1e-5)
    assert found["test_ece"] == pytest.approx(sum(map(abs, gaps.values())) / 7, rel=1e-4)
    [line] = [line for line in printed.splitlines() if line.startswith("test_loss")]
    assert line.split()[1:] == [f"{metrics_of(folder)['test_loss']:.6g}" for folder in (one, other)]
    assert "test_confusion" in found and "test_confusion" not in printed

    with pytest.raises(ValueError, match="--tasks: for causal models"):
        evaluate("--model", one, *options, "--tasks", "animals")
    write_labelled(data, labels=["cat", "dog"])
    with pytest.raises(ValueError, match=r"labels \['dog'\].*one does not know.*bird.*cat.*fish"):
        evaluate("--model", one, *options)


def test_a_classifiers_adapter_on_its_base_has_the_numbers_of_the_merged_model_and_of_its_recipe(
    evaluate, save_model, tmp_path
):
    base, data, run = save_model(build(), "base"), tmp_path / "test.jsonl", tmp_path / "classifier"
    write_labelled(data)
    recipe = load_recipe("finetune_classification")
    options = {"text_column": "message", "label_column": "kind", "max_steps": 3, "learning_rate": 0.05}
    options |= {"model": base, "output_dir": run, "validation_dataset": data, "test_dataset": data, "dataset": data}
    options |= {"block_size": 24, "lora_r": 2}
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(parse_arguments(recipe.ClassificationArguments, [f"--{k}={v}" for k, v in options.items()]))
    trained = metrics_of(run)

    same = ["--dataset", data, "--text_column", "message", "--label_column", "kind"]
    evaluate("--model", run, *same, "--output_dir", tmp_path / "merged")
    evaluate("--model", base, "--adapter", run / "adapter", *same, "--block_size", 24)
    for folder in (tmp_path / "merged", run / "adapter"):
        found = metrics_of(folder)
        assert found["test_confusion"] == trained["test_confusion"]
        for name in ("accuracy", "f1_macro", "loss", "ece"):
            assert found[f"test_{name}"] == pytest.approx(trained[f"test_{name}"], rel=1e-4), name

    stranger = build()
    with torch.no_grad():
        stranger.get_input_embeddings().weight.mul_(1.5)
    other = save_model(stranger, "other")
    with pytest.raises(ValueError, match="weights that it was trained on are not these"):
        evaluate("--model", other, "--adapter", run / "adapter", *same)
    (run / "config.json").unlink()
    evaluate("--model", base, "--adapter", run / "adapter", *same, "--block_size", 24)  # the adapter says them too
    assert metrics_of(run / "adapter")["test_confusion"] == trained["test_confusion"]
    (run / "adapter" / "base_model.json").unlink()
    with pytest.raises(ValueError, match="nothing says its labels"):
        evaluate("--model", base, "--adapter", run / "adapter", *same)


def finetune(tmp_path, base, rows, **options) -> dict:
    """Train a classifier on these rows, and test it on them; returns what it wrote into metrics.json."""
    data, recipe = tmp_path / "rows.jsonl", load_recipe("finetune_classification")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options |= {"model": base, "output_dir": tmp_path / "run", "max_steps": 3, "learning_rate": 0.05, "lora_r": 2}
    options |= dict.fromkeys(("dataset", "validation_dataset", "test_dataset"), data)
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(parse_arguments(recipe.ClassificationArguments, [f"--{k}={v}" for k, v in options.items()]))
    return metrics_of(tmp_path / "run")


@pytest.mark.parametrize(
    "labels, options, names",
    [
        ([["a"], [], ["a", "b"], ["b"], [], ["a"], ["b"]], {}, ["f1_micro", "f1_macro", "subset_accuracy", "loss"]),
        ([3.5, 10, -2, 7, 7.5, 0, 1], {"problem_type": "regression"}, ["mse", "mae", "r2", "pearson", "spearman"]),
        ([*"aabbaba"], {"long_texts": "window", "stride": 3, "block_size": 6}, ["accuracy", "loss", "f1_macro", "ece"]),
    ],
    ids=["several labels", "numbers", "windows"],
)
def test_a_saved_classifier_has_the_numbers_that_its_recipe_wrote(
    labels, options, names, evaluate, save_model, tmp_path
):
    base = save_model(build(), "base")
    trained = finetune(tmp_path, base, [{"text": t, "label": y} for t, y in zip(TEXTS, labels)], **options)
    evaluate("--model", tmp_path / "run", "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "merged")
    same = [f"--{name}={value}" for name, value in options.items() if name != "problem_type"]
    adapter = ["--model", base, "--adapter", tmp_path / "run" / "adapter"]
    evaluate(*adapter, "--dataset", tmp_path / "rows.jsonl", *same)
    for folder in (tmp_path / "merged", tmp_path / "run" / "adapter"):
        found = metrics_of(folder)
        for name in names:
            assert found[f"test_{name}"] == pytest.approx(trained[f"test_{name}"], rel=1e-3), name
        assert found["test_texts"] == 7
    if "stride" in options:
        assert found["test_stride"] == 3
        cut = ["--long_texts", "cut", "--output_dir", tmp_path / "cut"]
        evaluate("--model", tmp_path / "run", "--dataset", tmp_path / "rows.jsonl", *cut)
        assert metrics_of(tmp_path / "cut")["test_loss"] != pytest.approx(trained["test_loss"], rel=1e-3)


def test_conversations_have_the_numbers_that_the_instruction_recipe_wrote_for_them(evaluate, save_model, tmp_path):
    recipe = load_recipe("finetune_instruction")
    base, data, run = save_model(build(), "base"), tmp_path / "all.json", tmp_path / "chat"
    words = ["cat", "dog", "bird", "fish", "sees", "likes", "hears"]
    rows = [{"question": f"{word} {word}", "response": word} for word in words]
    data.write_text(json.dumps(rows))
    argv = ["--dataset", data, "--model", base, "--output_dir", run, "--max_steps", 3, "--check_answers", "true"]
    argv += ["--column_map", "question=prompt", "--validation_fraction", 0.2, "--test_fraction", 0.4]
    argv += ["--learning_rate", 0.01, "--method", "full", "--max_new_tokens", 8]
    args = parse_arguments(recipe.InstructionArguments, [str(word) for word in argv])
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe.main(args)
    trained = metrics_of(run)
    test = recipe.load_data(args)[0]["test"]
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in test))

    options = ["--dataset", held_out, "--conversations", "--per_device_eval_batch_size", 2, "--output_dir"]
    printed = evaluate("--model", run, base, *options, tmp_path / "n", "--check_answers", "--max_new_tokens", 8)
    found, before = metrics_of(tmp_path / "n" / "chat"), metrics_of(tmp_path / "n" / "base")
    assert found["test_conversations"] == found["test_answers"] == trained["test_answers"] == len(test) > 1
    assert found["test_loss"] == pytest.approx(trained["test_loss"], rel=1e-5)
    assert before["test_loss"] == pytest.approx(trained["test_loss_before"], rel=1e-5)
    assert found["test_exact_match"] == trained["test_exact_match"]
    assert "test_response_tokens" in printed

    # The replies are a model's own words: with them as the responses every one matches.
    tokenizer, model = load_tokenizer(run), hfllm.GPTForCausalLM.from_pretrained(run).eval()
    answered = []
    for row in test:
        prompt = tokenizer.apply_chat_template(row.messages[:1], add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        reply = tokenizer.decode(written, skip_special_tokens=True).strip()
        answered += [{"prompt": row.messages[0]["content"], "response": reply}] if reply else []
    assert answered
    held_out.write_text("".join(json.dumps(row) + "\n" for row in answered))
    evaluate("--model", run, *options, tmp_path / "own", "--check_answers", "--max_new_tokens", 8)
    assert metrics_of(tmp_path / "own")["test_exact_match"] == 1


@pytest.mark.slow
def test_perplexity_is_that_of_lm_eval_on_a_task_of_the_same_text(evaluate, save_model, tmp_path):
    pytest.importorskip("lm_eval")
    texts = [*make_sentences(4, seed=1)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.yaml").write_text(yaml.safe_dump(task))
    folder = save_model(build())
    evaluate("--model", folder, "--dataset", data, "--tasks", "animals", "--include_path", tmp_path / "tasks")
    found = metrics_of(folder)
    assert found["test_animals_bits_per_byte"] == pytest.approx(found["test_bits_per_byte"], rel=1e-5)
    byte_perplexity = math.exp(found["test_loss"] * found["test_tokens"] / found["test_bytes"])
    assert found["test_animals_byte_perplexity"] == pytest.approx(byte_perplexity, rel=1e-5)

    with pytest.raises(ValueError, match="did you mean 'animals'"):
        evaluate("--model", folder, "--tasks", "animal", "--include_path", tmp_path / "tasks")


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(evaluate, save_model, text, tmp_path):
    folder = save_model(build())
    evaluate("--model", folder, "--dataset", text, "--stride", 5)
    options = ["--model", folder, "--dataset", text, "--stride", 5, "--output_dir", tmp_path / "two"]
    words = [*command("multi_cpu.yaml", 2), "recipes/evaluate_model.py", *map(str, options)]
    finished = launch(words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("test_bits_per_byte") == 1, "only the main process speaks"
    one, two = metrics_of(folder), metrics_of(tmp_path / "two")
    assert two["test_tokens"] == one["test_tokens"]
    assert two["test_bits_per_byte"] == pytest.approx(one["test_bits_per_byte"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_share_labelled_texts_and_conversations_with_none_twice(evaluate, save_model, tmp_path):
    labelled, conversations = tmp_path / "labelled.jsonl", tmp_path / "conversations.jsonl"
    write_labelled(labelled)
    conversations.write_text(
        "".join(json.dumps({"prompt": word, "response": "the cat"}) + "\n" for word in ["a", "dog", "my bird"])
    )
    classifier, chat = save_model(build_classifier(), "classifier"), save_model(build(), "chat")
    for folder, options in [
        (classifier, ["--dataset", labelled, "--text_column", "message", "--label_column", "kind"]),
        (chat, ["--dataset", conversations, "--conversations", "--check_answers", "--max_new_tokens", 4]),
    ]:
        options = ["--model", folder, *options, "--output_dir"]
        evaluate(*options, tmp_path / "one")
        finished = launch(
            [*command("multi_cpu.yaml", 2), "recipes/evaluate_model.py", *map(str, options), str(tmp_path / "two")]
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
        assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
        counts = ("test_texts", "test_confusion", "test_response_tokens", "test_answers", "test_exact_match")
        assert {name: two.get(name) for name in counts} == {name: one.get(name) for name in counts}
