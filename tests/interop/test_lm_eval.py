"""lm_eval on our folder: its numbers equal the model's, computed one text at a time by hand.

The tasks are local (a YAML file and a JSONL file each), so that nothing is downloaded.
"""

import json
import math

import pytest
import torch
import yaml

import hfllm
from tests.interop.conftest import texts_of_length, token_log_probs


pytestmark = pytest.mark.slow

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "The first of three letters is", "choices": ["a", "something else", "never mind"], "answer": 0},
    {"question": "Is it so?\nAnswer:", "choices": ["yes", "no", "nobody can say that"], "answer": 1},
    {"question": "def f(x):\n    return", "choices": ["x", "None", "f"], "answer": 2},
]


@pytest.fixture
def evaluate(tmp_path):
    """Run one task of lm_eval, given as its YAML's fields and its documents; returns what it found."""
    from lm_eval.tasks import TaskManager

    def run(model, fields: dict, documents: list[dict], **options) -> dict:
        data = tmp_path / "documents.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        task = {
            "task": "ours",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            **fields,
        }
        (tmp_path / "ours.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        options = {"device": "cpu", "batch_size": 2, "bootstrap_iters": 0, **options}
        return lm_eval.simple_evaluate(model=model, tasks=["ours"], task_manager=manager, **options)

    return run


MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def score_by_hand(model, tokenizer, question: str, choice: str) -> float:
    """The log-probability of a space and the choice, after the bos token and the question."""
    start = len(tokenizer.encode(question))
    return token_log_probs(model, tokenizer.encode(f"{question} {choice}"))[start - 1 :].sum().item()


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_the_scores_of_choices_are_their_log_probabilities(preset, save_gpt, tokenizer, evaluate):
    folder = save_gpt(preset)
    found = evaluate("hf", MULTIPLE_CHOICE, QUESTIONS, model_args=f"pretrained={folder},dtype=float32")

    model = hfllm.GPTForCausalLM.from_pretrained(folder).eval()
    num_right = num_right_per_byte = 0
    for document, sample in zip(QUESTIONS, found["samples"]["ours"], strict=True):
        by_hand = [score_by_hand(model, tokenizer, document["question"], choice) for choice in document["choices"]]
        assert [float(score) for score, is_greedy in sample["filtered_resps"]] == pytest.approx(by_hand, abs=1e-4)
        per_byte = [score / len(choice) for score, choice in zip(by_hand, document["choices"])]
        num_right += by_hand.index(max(by_hand)) == document["answer"]
        num_right_per_byte += per_byte.index(max(per_byte)) == document["answer"]
    assert found["results"]["ours"]["acc,none"] == pytest.approx(num_right / len(QUESTIONS))
    assert found["results"]["ours"]["acc_norm,none"] == pytest.approx(num_right_per_byte / len(QUESTIONS))


def test_a_model_in_memory_gets_the_numbers_of_its_folder(folder, model, tokenizer, evaluate):
    from lm_eval.models.huggingface import HFLM

    from_folder = evaluate("hf", MULTIPLE_CHOICE, QUESTIONS, model_args={"pretrained": folder})
    in_memory = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), MULTIPLE_CHOICE, QUESTIONS)
    for one, other in zip(from_folder["samples"]["ours"], in_memory["samples"]["ours"], strict=True):
        for (score, is_greedy), (other_score, other_is_greedy) in zip(one["filtered_resps"], other["filtered_resps"]):
            assert float(score) == pytest.approx(float(other_score), abs=1e-4)
            assert is_greedy == other_is_greedy


ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
}


def rolling_log_likelihood(model, ids: list[int], prefix: int, context: int) -> float:
    """Every id predicted once, in windows of `context` inputs: all but the last do not overlap; the last is full."""
    total, done = 0.0, 0
    while done < len(ids):
        end = min(done + context, len(ids))
        window = ([prefix, *ids])[max(0, end - context) : end + 1]  # the inputs, and one more id to predict
        total += token_log_probs(model, window)[-(end - done) :].sum().item()
        done = end
    return total


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_bits_per_byte_are_the_models_own_also_of_texts_longer_than_its_context(preset, save_gpt, tokenizer, evaluate):
    folder = save_gpt(preset, max_position_embeddings=48)
    texts = texts_of_length(tokenizer, [20, 48, 110])
    # Without add_bos_token=False lm_eval has the model predict the bos token too, after the bos it puts in front.
    arguments = f"pretrained={folder},dtype=float32,add_bos_token=False"
    found = evaluate("hf", ROLLING, [{"text": text} for text in texts], model_args=arguments)

    model = hfllm.GPTForCausalLM.from_pretrained(folder).eval()
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    by_hand = [rolling_log_likelihood(model, ids, tokenizer.bos_token_id, context=48) for ids in encoded]
    scores = [float(sample["filtered_resps"][0]) for sample in found["samples"]["ours"]]
    assert scores == pytest.approx(by_hand, abs=1e-3)
    bits_per_byte = -sum(by_hand) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert found["results"]["ours"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, abs=1e-5)


def test_without_add_bos_token_false_the_bos_is_counted_as_a_prediction(folder, model, tokenizer, evaluate):
    """A fact about lm_eval that the README warns of: should it change, the warning goes."""
    text = texts_of_length(tokenizer, [30])[0]
    found = evaluate("hf", ROLLING, [{"text": text}], model_args={"pretrained": folder})
    bos = tokenizer.bos_token_id
    by_hand = token_log_probs(model, [bos, *tokenizer.encode(text)]).sum().item()
    assert tokenizer.encode(text)[0] == bos
    assert float(found["samples"]["ours"][0]["filtered_resps"][0]) == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_generating_for_a_padded_batch_gives_what_each_prompt_gives_alone(preset, save_gpt, tokenizer, evaluate):
    folder = save_gpt(preset)
    model = hfllm.GPTForCausalLM.from_pretrained(folder).eval()
    fields = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = evaluate("hf", fields, QUESTIONS, model_args={"pretrained": folder}, batch_size=3)
    assert len({len(tokenizer.encode(document["question"])) for document in QUESTIONS}) > 1, "some rows are padded"
    for document, sample in zip(QUESTIONS, found["samples"]["ours"], strict=True):
        ids = torch.tensor([tokenizer.encode(document["question"])])
        alone = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(alone, skip_special_tokens=True).split("\n\n")[0]
        assert sample["resps"][0][0] == expected


def test_a_chat_prompt_has_one_bos(folder):
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=folder, device="cpu")
    prompt = evaluated.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert evaluated.tok_encode(prompt).count(evaluated.tokenizer.bos_token_id) == 1
    assert prompt.endswith("<|im_start|>assistant\n")
