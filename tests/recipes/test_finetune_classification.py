import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Qwen3Config,
    pipeline,
)

import hfllm
from hfllm.adapters import load_adapter
from hfllm.cli.arguments import parse_arguments
from hfllm.data.labelled_texts import MULTI_LABEL, LabelledTexts, balance_labels, load_labelled_texts, split_by_text
from hfllm.fine_tuning import run as fine_tuning_run
from hfllm.runs.log import read_log
from hfllm.tokenization import load_tokenizer, train_bpe
from tests.conftest import make_tiny_config
from tests.recipes.conftest import RECIPES, load_recipe, make_sentences


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("finetune_classification")


@pytest.fixture
def classify(recipe, capsys, monkeypatch):
    """Run the recipe on command-line options; returns what it printed."""
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.getLogger("transformers").level)
    return lambda **options: run(recipe, capsys, **options)


def run(recipe, capsys, **options) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    capsys.readouterr()
    recipe.main(parse_arguments(recipe.ClassificationArguments, [f"--{k}={v}" for k, v in options.items()]))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_bpe(make_sentences(100), 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = make_tiny_config("modern", vocab_size=300, max_position_embeddings=48, initializer_range=0.1)
    hfllm.GPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spam(tmp_path_factory) -> Path:
    """Lines of the SMS collection's form: sentences of which those that end with a fish are spam."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("spam") / "messages.tsv"
    sentences = make_sentences(160, seed=5)
    lines = [f"spam\t{s} one fish" if draw.random() < 0.4 else f"ham\t{s} a dog" for s in sentences]
    path.write_text("\n".join([*lines, lines[0], "ham\t "]) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(recipe, base, spam, tmp_path_factory) -> tuple[dict, str]:
    """A run with LoRA: its options, and what it printed."""
    options = {
        "model": base,
        "dataset": spam,
        "output_dir": tmp_path_factory.mktemp("out") / "spam",
        "num_train_epochs": 3,
        "learning_rate": 2e-2,
        "head_learning_rate": 0.1,
        "lora_r": 4,
        "per_device_train_batch_size": 8,
        "block_size": 32,
        "logging_steps": 5,
    }
    level = logging.getLogger("transformers").level
    printed: list[str] = []

    class Capture:
        def readouterr(self):
            return type("Result", (), {"out": "".join(printed)})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words)) + "\n"))
        text = run(recipe, Capture(), **options)
    logging.getLogger("transformers").setLevel(level)
    return options, text


def read_metrics(options: dict) -> dict:
    return json.loads((Path(options["output_dir"]) / "metrics.json").read_text())


def test_before_training_it_says_what_it_found_and_what_it_trains(finished):
    _, text = finished
    for words in (
        "Texts: 112 to train on, 16 to validate on, 33 to test on.",
        "Labels: 2; in training ham",
        "Always saying 'ham' is right on",
        "Repeated texts:",
        "Left out: 1 empty texts.",
        "texts are longer than block_size 32 and cut at the end",
        "LoRA of rank 4 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; score.",
    ):
        assert words in text, words


def test_afterwards_it_writes_and_says_how_good_it_is_beside_the_baselines(finished):
    options, text = finished
    metrics = read_metrics(options)
    for name in ("accuracy", "f1_macro", "ece", "per_label", "confusion", "majority_accuracy"):
        assert f"test_{name}" in metrics
    assert metrics["test_accuracy"] > metrics["test_majority_accuracy"]
    assert np.sum(metrics["test_confusion"]) == metrics["test_texts"] == 33
    assert 0 < metrics["padding_waste"] < 0.2  # so few texts cannot all find others of their length
    for words in (
        "this model",
        "logistic regression, TF-IDF",
        "always the commonest label",
        "of the batches was padding",
    ):
        assert words in text
    is_beaten = metrics["test_logistic_regression_accuracy"] > metrics["test_accuracy"]
    assert ("The logistic regression is right on" in text) == is_beaten


def test_less_than_a_tenth_of_the_batches_is_padding_on_the_standard_librarys_docstrings(recipe, base, tmp_path):
    data = load_labelled_texts("stdlib")
    names = sorted(set(data.labels))
    tokenizer = recipe.load_classifier_tokenizer(str(base))
    rows_of_texts = recipe.encode(data, tokenizer, names, 256)
    waste = {}
    for strategy in ("group_by_length", "random"):
        args = recipe.ClassificationArguments(output_dir=str(tmp_path), train_sampling_strategy=strategy)
        rows = {"train": rows_of_texts, "eval": rows_of_texts}
        args.head_learning_rate = 1e-2
        trainer = recipe.make_trainer(args, torch.nn.Linear(1, 1), tokenizer, rows, names)
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        waste[strategy] = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert waste["group_by_length"] < 0.1 < 0.4 < waste["random"]


def test_the_folder_has_what_a_run_leaves_and_a_log_of_its_steps(finished):
    options, _ = finished
    out = Path(options["output_dir"])
    names = {"config.json", "model.safetensors", "tokenizer.json", "arguments.yaml", "log.jsonl", "metrics.json"}
    assert names | {"confusion.png", "adapter", "checkpoints"} <= {path.name for path in out.iterdir()}
    assert yaml.safe_load((out / "arguments.yaml").read_text())["learning_rate"] == 2e-2
    log = read_log(out / "log.jsonl")
    assert {"step", "loss", "learning_rate", "grad_norm"} <= set(log[0])
    evaluations = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    assert len(evaluations) == 3


def test_a_label_with_control_characters_does_not_reach_the_terminal(base, classify, tmp_path):
    path = tmp_path / "labelled.jsonl"
    rows = [
        {"text": f"{s} {n}", "label": ("\x1b[31mred", "blue")[n % 2]} for n, s in enumerate(make_sentences(60, seed=3))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    told = classify(model=base, dataset=path, output_dir=tmp_path / "out", max_steps=2, block_size=24)
    assert "\x1b" not in told
    assert told.count("\\x1b[31mred") >= 2  # before training, and in the table of scores


def test_a_pipeline_answers_with_the_labels_words_as_the_test_did(finished):
    options, _ = finished
    classify = pipeline("text-classification", str(options["output_dir"]))
    texts = ["the cat sees a dog one fish", "the cat sees one fish a dog"]
    answers = classify(texts, batch_size=2)
    assert {answer["label"] for answer in answers} <= {"ham", "spam"}
    model = AutoModelForSequenceClassification.from_pretrained(options["output_dir"])
    assert model.config.problem_type == "single_label_classification" and model.config.label2id == {"ham": 0, "spam": 1}
    tokenizer = AutoTokenizer.from_pretrained(options["output_dir"])
    for text, answer in zip(texts, answers):
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)
    assert classify("the cat sees a dog. " * 40, truncation=True)[0]["label"] in ("ham", "spam")


def test_text_that_names_a_control_token_is_text_in_training_and_in_the_pipeline(finished, recipe, base):
    text = "a dog <|endoftext|> one fish"
    trained_on = recipe.encode(LabelledTexts([text], ["x"]), recipe.load_classifier_tokenizer(str(base)), ["x"], 32)
    tokenizer = AutoTokenizer.from_pretrained(finished[0]["output_dir"])
    assert tokenizer(text)["input_ids"] == trained_on[0]["input_ids"]
    assert tokenizer.eos_token_id not in trained_on[0]["input_ids"]


def test_a_classifier_pads_and_cuts_on_the_right_whatever_its_base_is_used_to(recipe, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = tokenizer.truncation_side = "left"  # as left behind by batched generation
    tokenizer.save_pretrained(tmp_path / "left")
    tokenizer = recipe.load_classifier_tokenizer(str(tmp_path / "left"))
    tokenizer.save_pretrained(tmp_path / "right")
    opened = AutoTokenizer.from_pretrained(tmp_path / "right")
    for each in (tokenizer, opened):
        batch = each(["a dog", "the cat sees one fish and a dog"], padding=True)
        assert batch["attention_mask"][0][0] == 1 and batch["attention_mask"][0][-1] == 0
        ids = each("a dog sees the cat")["input_ids"]
        assert each("a dog sees the cat", truncation=True, max_length=3)["input_ids"] == ids[:3]


def test_a_long_text_loses_its_end_and_ends_with_a_token_of_its_own(recipe, base):
    tokenizer = recipe.load_classifier_tokenizer(str(base))
    text = "the cat sees a dog. " * 20
    row = recipe.encode(LabelledTexts([text], ["x"]), tokenizer, ["x"], 16)[0]
    assert (
        row["input_ids"]
        == tokenizer(text)["input_ids"][:16]
        == tokenizer(text, truncation=True, max_length=16)["input_ids"]
    )
    assert row["text_length"] == len(tokenizer(text)["input_ids"])
    assert row["input_ids"][-1] not in tokenizer.all_special_ids


def test_the_adapter_on_its_base_gives_the_merged_models_logits(finished, base):
    out = Path(finished[0]["output_dir"])
    adapted = load_adapter(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), out / "adapter")
    ids = torch.arange(5, 25).view(2, 10)
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-4)
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(out / "model.safetensors")


def test_a_finished_run_has_nothing_to_do_and_another_one_is_refused(finished, classify):
    options, _ = finished
    assert "is finished: nothing to do" in classify(**options)
    with pytest.raises(ValueError, match=r"belongs to another run:\n    learning_rate was 0.02 and is 0.1\n"):
        classify(**{**options, "learning_rate": 0.1})


def test_an_interrupted_run_resumes_to_the_same_weights(finished, classify, recipe, tmp_path, monkeypatch):
    """Stopped after two of three epochs; dropout and the order of texts continue where they were."""
    straight, _ = finished
    options = {**straight, "output_dir": tmp_path / "out"}

    class Stopped(Exception):
        pass

    class StopAfterTwo(fine_tuning_run.LogFile):
        def on_save(self, args, state, control, **kwargs):
            if state.epoch == 2:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning_run, "LogFile", StopAfterTwo)
        with pytest.raises(Stopped):
            classify(**options)
    assert not (tmp_path / "out" / "metrics.json").exists()
    classify(**options)
    expected = load_file(Path(straight["output_dir"]) / "model.safetensors")
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    steps = [entry["step"] for entry in read_log(tmp_path / "out" / "log.jsonl") if "eval_loss" in entry]
    assert steps == sorted(set(steps)) and len(steps) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "last_block", "head"])
def test_the_other_methods_train_only_what_they_name(method, finished, classify, base, tmp_path):
    unused = ("lora_r", "learning_rate") if method == "head" else ("lora_r",)
    options = {name: value for name, value in finished[0].items() if name not in unused}
    classify(**{**options, "method": method, "output_dir": tmp_path / "out", "max_steps": 3})
    before = hfllm.GPTForCausalLM.from_pretrained(base).state_dict()
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, weight in after.items() if name in before and not torch.equal(weight, before[name])}
    if method == "head":
        assert changed == set()
    elif method == "last_block":
        assert changed and all(name.startswith(("model.layers.1.", "model.norm.")) for name in changed)
    else:
        assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= changed
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 100}, "block_size=100 is longer than the model's context of 48 tokens"),
        ({"method": "head", "lora_r": 8}, "--lora_r: only --method lora has LoRA"),
        ({"method": "head", "learning_rate": 0.1}, "Give --head_learning_rate"),
        (
            {"model": "GPT2", "pooling": "mean"},
            "--pooling mean: .* is a gpt2, whose classifier in transformers reads",
        ),
        ({"test_fraction": 0.95}, "leave nothing to train on"),
        ({"text_column": "massage", "dataset": "CSV"}, "did you mean text_column='message'"),
        ({"test_split": "test", "test_dataset": "x.csv"}, "both say what to use for test"),
        ({"validation_dataset": "CSV", "text_column": "message"}, "validation texts have labels that no training text"),
        ({"dataset": "ONE", "text_column": "message"}, "All 3 texts have the label 'spam'"),
        ({"problem_type": "regression"}, "messages.tsv, line 1: its 'label' is '.*am', not a number"),
        ({"problem_type": "regression", "balance": "true"}, "--balance: only where a text has one label"),
        (
            {"label_separator": ",", "label_smoothing_factor": 0.1},
            "--label_smoothing_factor: only where .* multi_l",
        ),
        ({"problem_type": "regression", "label_separator": ";"}, "label_separator=';' is for several labels"),
        ({"stride": 8}, "--stride is for --long_texts window"),
        ({"stride": 33, "long_texts": "window", "block_size": 32}, "--stride 33 is larger than the block_size 32"),
    ],
)
def test_what_cannot_work_stops_before_training(options, message, classify, base, spam, tmp_path):
    (tmp_path / "a.csv").write_text("message,label\nhello you,eggs\nfree prize,spam\n")
    (tmp_path / "one.csv").write_text("message,label\na,spam\nb,spam\nc,spam\n")
    files = {"CSV": tmp_path / "a.csv", "ONE": tmp_path / "one.csv", "GPT2": tmp_path / "gpt2"}
    GPT2Config(n_embd=8, n_head=2, n_layer=1).save_pretrained(tmp_path / "gpt2")
    options = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        classify(**{"model": base, "dataset": spam, "output_dir": tmp_path / "out", **options})


def test_what_is_not_given_is_chosen_by_method_and_model(recipe, base, tmp_path):
    def chosen(model, **options):
        return recipe.choose_for_model(recipe.ClassificationArguments(model=str(model), **options))

    small, large = recipe.LEARNING_RATES["full"]
    assert chosen(base, method="full") == ("mean_first_last", small, recipe.HEAD_LEARNING_RATES["full"][0])
    assert chosen(base, method="full", learning_rate=1e-4, pooling="last")[:2] == ("last", 1e-4)
    assert chosen(base, method="head", head_learning_rate=0.5) == ("mean_first_last", 0.5, 0.5)
    Qwen3Config(hidden_size=1024).save_pretrained(tmp_path)
    assert chosen(tmp_path, method="full") == ("last", large, recipe.HEAD_LEARNING_RATES["full"][1])


def test_loras_rates_are_its_own_and_not_those_of_full_fine_tuning(recipe, base, tmp_path):
    """The book trains GPT-2 with 5e-5, and LoRA with 8e-4: with the rate of all weights LoRA hardly moves."""
    Qwen3Config(hidden_size=1024).save_pretrained(tmp_path)
    for model, at_least in ((base, 5), (tmp_path, 10)):
        rates = {
            method: recipe.choose_for_model(recipe.ClassificationArguments(model=str(model), method=method))[1]
            for method in ("lora", "full")
        }
        assert rates["lora"] >= at_least * rates["full"]
    assert rates == {"lora": 8e-4, "full": 5e-5}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 of transformers with a tokenizer of its kind: no pad token, no bos in front."""
    folder = tmp_path_factory.mktemp("gpt2")
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(make_sentences(100), 320, special_tokens=["<|endoftext|>"])
    backend.save_model(str(folder))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token is None and tokenizer.bos_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
    GPT2LMHeadModel(GPT2Config(**sizes, **ids, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


def test_gpt2_of_transformers_learns_spam_by_the_config_of_the_collection(gpt2, spam, classify, tmp_path):
    config = RECIPES / "configs" / "classification_sms.yaml"
    options = {"config": config, "model": gpt2, "dataset": spam, "output_dir": tmp_path / "spam"}
    text = classify(**options, num_train_epochs=8, learning_rate=5e-3, per_device_eval_batch_size=7)
    ham, spams = (int(number) for number in re.search(r"in training ham (\d+), spam (\d+)\.", text).groups())
    assert abs(ham - spams) <= 1  # as much ham as spam
    metrics = read_metrics(options)
    assert metrics["method"] == "full" and metrics["num_trained_parameters"] == metrics["num_parameters"]
    assert metrics["test_accuracy"] > 0.9

    # What the recipe measured in padded batches is what anybody gets for one text alone, though pad is eos.
    classifier = pipeline("text-classification", str(tmp_path / "spam"))
    assert type(classifier.model) is GPT2ForSequenceClassification
    assert (
        classifier.tokenizer.pad_token_id == classifier.tokenizer.eos_token_id == classifier.model.config.pad_token_id
    )
    data = balance_labels(load_labelled_texts(str(spam)), seed=0)
    test = split_by_text(data, seed=0)[2]
    right = [classifier(text)[0]["label"] == label for text, label in zip(test.texts, test.labels)]
    assert np.mean(right) == metrics["test_accuracy"]
    [alone] = classifier(test.texts[0])
    batch = classifier(test.texts[:5], batch_size=5)
    assert batch[0]["score"] == pytest.approx(alone["score"], abs=1e-6)


def test_the_saved_folder_and_the_adapter_name_the_pooling(finished):
    out = Path(finished[0]["output_dir"])
    for path in (out / "config.json", out / "adapter" / "base_model.json"):
        assert json.loads(path.read_text())["classifier_pooling"] == "mean_first_last"
    assert yaml.safe_load((out / "arguments.yaml").read_text())["pooling"] == "mean_first_last"


def test_given_test_texts_are_not_split_off(recipe, spam, tmp_path):
    (tmp_path / "test.tsv").write_text("spam\tone fish\nspam\ttwo fish\nham\ta dog\n")
    args = recipe.ClassificationArguments(dataset=str(spam), test_dataset=str(tmp_path / "test.tsv"))
    train, validation, test = recipe.load_parts(args)
    assert test.texts == ["one fish", "two fish", "a dog"]
    assert len(train) + len(validation) == len(load_labelled_texts(str(spam)))


def test_several_test_datasets_are_told_apart(recipe, spam, tmp_path):
    (tmp_path / "a.tsv").write_text("spam\tone fish\nham\ta dog\n")
    (tmp_path / "b.tsv").write_text("spam\ttwo fish\nspam\tthree fish\n")
    args = recipe.ClassificationArguments(dataset=str(spam), test_dataset=f"{tmp_path}/a.tsv,{tmp_path}/b.tsv")
    test = recipe.load_parts(args)[2]
    assert test.texts == ["one fish", "a dog", "two fish", "three fish"]
    logits, targets = {"test": np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])}, {"test": np.array([1, 0, 1, 1])}
    scores = recipe.score_by_name(logits, {"test": test}, targets, ["ham", "spam"])
    assert scores == {"test_accuracy_a": 0.5, "test_accuracy_b": 1.0}


@pytest.mark.parametrize("name", ["classification_stdlib.yaml", "classification_sms.yaml"])
def test_the_configs_are_options_of_the_recipe(name, recipe):
    args = parse_arguments(recipe.ClassificationArguments, ["--config", str(RECIPES / "configs" / name)])
    args.check()
    assert (args.text_column == "sms") == args.balance == ("sms" in name)


@pytest.fixture(scope="module")
def animals(tmp_path_factory) -> Path:
    """Sentences with the animals in them, and how often the dog is among these, times 100 and 5000 more."""
    lines = [
        json.dumps(
            {
                "text": text,
                "animals": [name for name in ("cat", "dog", "bird") if name in text],
                "dogs": 5000 + 100 * text.count("dog"),
            }
        )
        for text in make_sentences(120, seed=7)
    ]
    path = tmp_path_factory.mktemp("animals") / "animals.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


OPTIONS = {
    "learning_rate": 1e-2,
    "head_learning_rate": 0.1,
    "lora_r": 4,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
}


def test_several_labels_at_once_are_learned_and_a_pipeline_says_each(base, animals, classify, tmp_path):
    options = {**OPTIONS, "model": base, "dataset": animals, "label_column": "animals", "output_dir": tmp_path / "out"}
    text = classify(**options)
    assert "Labels: 3, several at once (multi_label_classification); in training bird" in text
    metrics = read_metrics(options)
    assert metrics["test_f1_micro"] > metrics["test_majority_f1_micro"]
    assert metrics["best_checkpoint"] and (tmp_path / "out" / "labels.png").exists()
    assert yaml.safe_load((tmp_path / "out" / "arguments.yaml").read_text())["problem_type"] == MULTI_LABEL
    card = (tmp_path / "out" / "README.md").read_text()
    assert "top_k=None" in card and "labels.png" in card and "gives every text one of them" not in card

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == MULTI_LABEL and list(model.config.label2id) == ["bird", "cat", "dog"]
    sentence = "the cat sees a dog"
    said = pipeline("text-classification", str(tmp_path / "out"))(sentence, top_k=None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    probabilities = model(**tokenizer(sentence, return_tensors="pt")).logits.sigmoid()[0].tolist()
    assert {each["label"]: each["score"] for each in said} == pytest.approx(
        dict(zip(["bird", "cat", "dog"], probabilities)), abs=1e-5
    )
    # The same labels said in another way are the same run; other options are another one.
    assert "is finished: nothing to do" in classify(**options, problem_type=MULTI_LABEL)
    with pytest.raises(ValueError, match=r"long_texts was .?cut.? and is .?window"):
        classify(**options, long_texts="window")


def test_a_number_is_learned_in_its_own_unit_by_every_door(base, animals, classify, tmp_path):
    out = tmp_path / "out"
    options = {**OPTIONS, "model": base, "dataset": animals, "label_column": "dogs", "output_dir": out}
    text = classify(**options, problem_type="regression")
    assert "Numbers: in training from 5000 to" in text and "always the mean" in text
    metrics = read_metrics(options)
    assert metrics["test_mse"] < metrics["test_mean_mse"] and metrics["test_r2"] > 0.3
    assert (out / "predictions.png").exists() and not (out / "confusion.png").exists()
    evaluations = [entry for entry in read_log(out / "log.jsonl") if "eval_loss" in entry]
    assert min(entry["eval_loss"] for entry in evaluations) == pytest.approx(metrics["eval_mse"], rel=1e-3)
    card = (out / "README.md").read_text()
    assert "mean squared error" in card and "confus" not in card and "accuracy" not in card and "nats" not in card

    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.problem_type == "regression" and model.config.id2label == {0: "dogs"}
    said = pipeline("text-classification", str(out))("a dog sees a dog")
    tokenizer = AutoTokenizer.from_pretrained(out)
    number = model(**tokenizer("a dog sees a dog", return_tensors="pt")).logits.item()
    assert said == [{"label": "dogs", "score": pytest.approx(number, rel=1e-5)}] and 5000 < number < 5600
    adapted = load_adapter(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, problem_type="regression"),
        out / "adapter",
    )
    assert adapted(**tokenizer("a dog sees a dog", return_tensors="pt")).logits.item() == pytest.approx(
        number, rel=1e-5
    )
    with pytest.raises(ValueError, match="its head has a bias; open the base with problem_type='regression'"):
        load_adapter(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), out / "adapter")

    # Trained further for the same numbers, it starts with the head that it has.
    rates = {"learning_rate": 0, "head_learning_rate": 0, "max_steps": 1}
    classify(**{**options, **rates, "model": out, "output_dir": tmp_path / "further"}, problem_type="regression")
    further = AutoModelForSequenceClassification.from_pretrained(tmp_path / "further")
    assert further(**tokenizer("a dog sees a dog", return_tensors="pt")).logits.item() == pytest.approx(
        number, rel=1e-5
    )


def test_long_texts_are_read_whole_in_windows_and_split_and_measured_by_text(base, classify, recipe, tmp_path):
    """The word that decides stands behind the context, where a text that is cut loses it."""
    texts = [f"{sentence}. " * 4 for sentence in make_sentences(60, seed=9)]
    path = tmp_path / "long.tsv"
    path.write_text(
        "".join(f"{['dog', 'cat'][n % 2]}\t{text}{['dog', 'cat'][n % 2] * 9}\n" for n, text in enumerate(texts))
    )
    options = {**OPTIONS, "model": base, "dataset": path, "output_dir": tmp_path / "out", "block_size": 24}
    text = classify(**{**options, "num_train_epochs": 1}, long_texts="window", stride=16)
    assert re.search(r"texts are longer than block_size 24, and are read in windows that begin 16 tokens apart", text)
    metrics = read_metrics(options)
    assert metrics["train_texts"] == 42 and metrics["train_rows"] > 100 and metrics["test_texts"] == 12
    assert f"the 42 training texts {metrics['train_rows']:,}." in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A pipeline reads the first window only" in card
