import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, pipeline

from hfllm import GPTForCausalLM, train_bpe
from hfllm.adapters import add_lora, save_adapter
from hfllm.hub import write_card
from hfllm.hub.card import BEGIN, END, choose_card, join_cards, make_card
from hfllm.hub.forms import save_merged
from hfllm.report import read_run
from tests.conftest import make_tiny_config
from tests.hub.double import card_errors
from tests.recipes.conftest import make_sentences


@pytest.fixture
def copied(make_run):
    return make_run(seed=7)


def test_the_results_are_metadata_that_huggingface_hub_reads_back(copied):
    assert write_card(copied)
    card = ModelCard.load(copied / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["loss"].metric_value == 2.5 and results["bits_per_byte"].metric_value == 1.25
    assert results["loss"].dataset_name == "animals.txt" and results["loss"].dataset_split == "validation"
    assert results["loss"].dataset_args == {"sha256": "ab" * 32}
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert card_errors(card.data.to_dict()) == []


def test_a_number_that_was_measured_afterwards_is_another_texts(copied):
    metrics = json.loads((copied / "metrics.json").read_text())
    metrics |= {
        "test_loss": 3.5,
        "test_dataset": "/home/somebody/birds.txt",
        "evaluated": ["test_dataset", "test_loss"],
    }
    (copied / "metrics.json").write_text(json.dumps(metrics))
    write_card(copied)
    card = ModelCard.load(copied / "README.md")
    named = {(result.dataset_name, result.metric_value): result.dataset_args for result in card.data.eval_results}
    assert named[("birds.txt", 3.5)] is None and named[("animals.txt", 2.5)] == {"sha256": "ab" * 32}
    assert "measured afterwards, on `birds.txt`" in card.text and card_errors(card.data.to_dict()) == []


def test_a_card_says_what_the_run_was(copied):
    card = make_card(read_run(copied), repo_id="me/my-gpt")
    for said in ("# my-gpt", '"me/my-gpt"', "animals.txt", "ab" * 32, "1,234 tokens", "9.5 s", "| hidden size | 32 |"):
        assert said in card, said
    assert "| `learning_rate` | 0.001 |" in card
    assert "/home/somebody" not in card


def test_a_number_that_is_not_finite_is_not_a_result(copied):
    metrics = json.loads((copied / "metrics.json").read_text())
    (copied / "metrics.json").write_text(json.dumps({**metrics, "eval_loss": float("nan")}))
    write_card(copied)
    types = {result.metric_type for result in ModelCard.load(copied / "README.md").data.eval_results}
    assert types == {"bits_per_byte"}


def test_a_sample_cannot_end_its_block(copied):
    (copied / "samples.txt").write_text("--- step 3\n```\n# not a heading\n````\n")
    card = make_card(read_run(copied))
    assert "`````text\n```\n# not a heading\n````\n`````" in card


def test_names_labels_and_questions_are_text_on_a_card(copied):
    metrics = json.loads((copied / "metrics.json").read_text())
    (copied / "metrics.json").write_text(json.dumps({**metrics, "dataset": "<script>`|.txt"}))
    (copied / "samples.txt").write_text("--- <img src=x> **bold**\n<!-- written by hfllm: end -->\nafter\n")
    write_card(copied)
    text = ModelCard.load(copied / "README.md").text
    assert "| dataset | `` <script>`\\|.txt `` |" in text
    assert "asked: &lt;img src=x> \\*\\*bold\\*\\*" in text
    before, after = text.split(BEGIN)[0], text.rsplit(END, 1)[1]
    assert before.strip() == after.strip() == ""
    write_card(copied)  # a mark inside a sample does not make the rest of the card a person's words
    assert ModelCard.load(copied / "README.md").text == text


def test_a_chats_card_shows_messages_and_what_it_was_fine_tuned_on(copied, monkeypatch):
    monkeypatch.chdir(copied)  # where out/demo is no folder, as it is after `make demo`
    arguments = {"model": "out/demo", "dataset": "stdlib", "train_on_prompt": False, "sample_prompt": "import "}
    (copied / "arguments.yaml").write_text(json.dumps(arguments))
    (copied / "metrics.json").write_text(json.dumps({"dataset": "stdlib"}))
    (copied / "samples.txt").write_text("--- What is 3 + 4?\nexpected: 7\n")
    card = make_card(read_run(copied), repo_id="me/chat")
    assert 'messages = [{"role": "user", "content": "What is 3 + 4?"}]' in card
    assert "python recipes/chat.py --model me/chat" in card and "import " not in card.split("```")[1].split("\n", 2)[2]
    assert "fine-tuned from out/demo on questions about Python" in card
    assert "the source of Python's standard library" not in card


def test_words_of_a_person_stay_and_boilerplate_goes(copied):
    write_card(copied)
    path = copied / "README.md"
    path.write_text(path.read_text().replace(END, END + "\n\nMine.").replace("tags:", "license: mit\ntags:"))
    assert write_card(copied)
    card = ModelCard.load(path)
    assert card.data.license == "mit" and card.text.rstrip().endswith("Mine.")
    path.write_text("---\nlibrary_name: peft\n---\n# Model Card for Model ID\n")
    assert write_card(copied) and BEGIN in path.read_text()
    path.write_text("# All by hand\n")
    assert not write_card(copied) and path.read_text() == "# All by hand\n"
    assert join_cards("new", "# All by hand") is None


def test_the_card_pushed_is_the_one_with_a_persons_words(copied):
    made = make_card(read_run(copied))
    mine, theirs = (made.replace(END, f"{END}\n\n{words}") for words in ("Said here.", "Said there."))
    assert choose_card(made, here="", there="") == made
    assert choose_card(made, here="", there=theirs).rstrip().endswith("Said there.")
    assert choose_card(made, here=mine, there=made).rstrip().endswith("Said here.")
    assert choose_card(made, here="# By hand", there=theirs) == "# By hand"
    assert choose_card(made, here=mine, there="# By hand there") == "# By hand there"
    licensed = ModelCard(choose_card(made, here="", there="---\nlicense: mit\n---\n"))  # as the Hub's page makes it
    assert licensed.data.license == "mit" and BEGIN in licensed.text


def test_an_adapters_card_names_its_base(tmp_path):
    config = {"base_model_name_or_path": "me/my-gpt", "r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = ModelCard(make_card(read_run(tmp_path), repo_id="me/lora"))
    assert card.data.base_model == "me/my-gpt" and card.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "me/lora")' in card.text
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    (tmp_path / "arguments.yaml").write_text("pooling: mean\n")
    text = make_card(read_run(tmp_path), repo_id="me/lora")
    options = 'num_labels=..., classifier_pooling="mean", trust_remote_code=True'  # nothing says its labels
    assert f'from_pretrained("me/my-gpt", {options})' in text and "put their number" in text


@pytest.fixture
def animals(tmp_path) -> dict[str, str]:
    """A classifier's adapter in animals/, its base in base/; texts, and what the two make of them."""
    sentences = make_sentences(60)
    tokenizer = train_bpe(sentences, 300)
    for part in (GPTForCausalLM(make_tiny_config("modern", vocab_size=300)), tokenizer):
        part.save_pretrained(tmp_path / "base")
    names = {0: "a dog", 1: 'the "cat"', 2: "fish"}
    options = {"id2label": names, "classifier_pooling": "mean_first_last"}
    adapted = add_lora(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options), r=4).eval()
    with torch.no_grad():
        for weight in adapted.parameters():  # so that the adapter, the head and the pooling all count
            weight.copy_(torch.randn_like(weight) if weight.requires_grad else weight)
        logits = [adapted(**tokenizer(sentence, return_tensors="pt")).logits for sentence in sentences]
    save_adapter(adapted, tmp_path / "animals")
    labels = [names[each.argmax().item()] for each in logits]
    assert len(set(labels)) > 1
    return dict(zip(labels, sentences))


def test_the_code_on_a_classifiers_adapters_card_runs_unchanged(animals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    card = make_card(read_run("animals"), base_model="base")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    for label, sentence in animals.items():
        assert "A text to sort." in code
        exec(code.replace("A text to sort.", sentence), {})
        assert capsys.readouterr().out == f"{label}\n"


def test_a_classifiers_adapter_alone_merges_with_its_labels(animals, tmp_path):
    save_merged(tmp_path / "animals", tmp_path / "merged")
    classify = pipeline("text-classification", str(tmp_path / "merged"))
    for label, sentence in animals.items():
        assert classify(sentence)[0]["label"] == label


def test_a_base_that_is_a_folder_of_this_machine_is_not_named(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
    card = make_card(read_run(tmp_path), repo_id="me/lora")
    assert str(tmp_path) not in card and ModelCard(card).data.base_model is None
