import json

import pytest
from huggingface_hub import ModelCard

from hfllm.hub import write_card
from hfllm.hub.card import BEGIN, END, choose_card, join_cards, make_card
from hfllm.report import read_run
from tests.hub.double import card_errors


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


def test_a_number_that_is_not_finite_is_no_result(copied):
    metrics = json.loads((copied / "metrics.json").read_text())
    (copied / "metrics.json").write_text(json.dumps({**metrics, "eval_loss": float("nan")}))
    write_card(copied)
    types = {result.metric_type for result in ModelCard.load(copied / "README.md").data.eval_results}
    assert types == {"bits_per_byte"}


def test_a_sample_cannot_end_the_block_it_stands_in(copied):
    (copied / "samples.txt").write_text("--- step 3\n```\n# not a heading\n````\n")
    card = make_card(read_run(copied))
    assert "`````text\n```\n# not a heading\n````\n`````" in card


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
    assert 'from_pretrained("me/my-gpt", classifier_pooling="mean", trust_remote_code=True)' in text


def test_a_base_that_is_a_folder_of_this_machine_is_not_named(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 8}))
    card = make_card(read_run(tmp_path), repo_id="me/lora")
    assert str(tmp_path) not in card and ModelCard(card).data.base_model is None
