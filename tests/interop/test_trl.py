"""TRL's SFTTrainer and DPOTrainer on our folder: they train on the tokens that they are documented to train on."""

import math
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig

import hfllm
from tests.interop.conftest import LINEAR_LAYERS, QUIET_TRAINING, logged, texts_of_length, token_log_probs


pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")

LENGTHS = [50, 3, 17, 30, 9, 24, 40, 12]  # tokens of text; with bos and eos they fill rows of 64 unevenly


def make_sft_trainer(model, output_dir: str, dataset: Dataset, peft_config=None, **options):
    options = {"max_length": 64, "per_device_train_batch_size": 4, "max_steps": 1, **QUIET_TRAINING, **options}
    arguments = trl.SFTConfig(output_dir=output_dir, **options)
    return trl.SFTTrainer(model, args=arguments, train_dataset=dataset, peft_config=peft_config)


@pytest.fixture(scope="module")
def documents(tokenizer) -> Dataset:
    return Dataset.from_dict({"text": texts_of_length(tokenizer, LENGTHS)})


CONVERSATIONS = [
    [("user", "Say one"), ("assistant", "One."), ("user", "And then?"), ("assistant", "Two, and three.")],
    [("system", "Be short."), ("user", "A colour?"), ("assistant", "Blue")],
    [("user", "Bye"), ("assistant", "Good night!")],
]


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return Dataset.from_dict(
        {"messages": [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]}
    )


def encode_by_hand(tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """A conversation's ids, put together turn by turn, and its labels: what the assistant says, and to stop."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, labels = [tokenizer.bos_token_id], [-100]
    for role, text in turns:
        header = [start, *tokenizer.encode(f"{role}\n", add_special_tokens=False)]
        content = [*tokenizer.encode(text, add_special_tokens=False), end]
        newline = tokenizer.encode("\n", add_special_tokens=False)
        ids += header + content + newline
        labels += [-100] * len(header) + (content if role == "assistant" else [-100] * len(content))
        labels += [-100] * len(newline)
    return ids, labels


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"padding_free": True, "max_length": None},
    ],
    ids=["bfd", "bfd_split", "padding_free"],
)
def test_documents_that_share_a_row_have_the_loss_that_each_has_alone(options, folder, model, documents, output_dir):
    """TRL keeps packed documents apart by `position_ids` alone; whether anybody heeds them is up to the model."""
    trainer = make_sft_trainer(folder, output_dir, documents, **options)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    ids, position_ids = batch["input_ids"][0], batch["position_ids"][0]
    starts = [*(position_ids == 0).nonzero().flatten().tolist(), len(ids)]
    rows = [ids[start:end].tolist() for start, end in pairwise(starts)]
    assert len(rows) >= 4, "a row holds several documents"

    alone = [token_log_probs(model, row) for row in rows]
    expected = -torch.cat(alone).mean()
    num_targets = sum(map(len, alone))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        summed = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(num_targets))
        by_the_model_itself = model(**batch, use_cache=False).loss
        leaking = model(ids[None], labels=batch["labels"], use_cache=False).loss
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(summed.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_the_model_itself.double(), expected, atol=1e-5, rtol=0)
    assert abs(leaking.double() - expected) > 0.01, "documents that saw each other would have another loss"


def test_packing_loses_no_document_and_adds_one_bos_and_one_eos_to_each(folder, documents, tokenizer, output_dir):
    trainer = make_sft_trainer(folder, output_dir, documents, packing=True, packing_strategy="bfd")
    packed = []
    for row in trainer.train_dataset:
        ids = iter(row["input_ids"])
        packed += [[next(ids) for _ in range(length)] for length in row["seq_lengths"]]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in documents["text"]]
    assert sorted(packed) == sorted(bos + ids + eos for ids in texts)
    assert len(trainer.train_dataset) < len(documents)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_documents_are_learned_through_lora_and_the_adapter_loads_again(
    strategy, folder, model, documents, output_dir
):
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    options = {"packing": True, "packing_strategy": strategy, "learning_rate": 2e-2, "max_steps": 12}
    trainer = make_sft_trainer(folder, output_dir, documents, lora, **options)
    trained_names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert {name.split(".")[-4] for name in trained_names} == set(LINEAR_LAYERS)
    assert all(".lora_" in name for name in trained_names)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 1, losses
    for name, weight in model.named_parameters():
        frozen = trainer.model.get_base_model().get_parameter(
            name.replace(".weight", ".base_layer.weight") if name.split(".")[-2] in LINEAR_LAYERS else name
        )
        assert torch.equal(frozen, weight), name

    trainer.save_model()
    reloaded = AutoPeftModelForCausalLM.from_pretrained(output_dir).eval()
    ids = torch.arange(5, 40)[None]
    trained = trainer.model.eval()(ids).logits
    torch.testing.assert_close(reloaded(ids).logits, trained)
    assert (trained - model(ids).logits).abs().max() > 1


def test_assistant_only_loss_covers_exactly_the_answers_and_the_end_of_their_turns(
    folder, model, conversations, tokenizer, output_dir
):
    trainer = make_sft_trainer(folder, output_dir, conversations, assistant_only_loss=True, shuffle_dataset=False)
    by_hand = [encode_by_hand(tokenizer, turns) for turns in CONVERSATIONS]
    for row, (ids, labels) in zip(trainer.train_dataset, by_hand, strict=True):
        assert row["input_ids"] == ids
        assert row["labels"] == labels
        assert labels.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) >= 1

    expected = [
        token_log_probs(model, ids)[torch.tensor(labels[1:]) != -100] for ids, labels in by_hand
    ]  # one conversation at a time, without the padding of the batch
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(by_hand))])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    torch.testing.assert_close(loss.double(), -torch.cat(expected).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_model_tuned_on_answers_gives_them_and_stops(packing, folder, conversations, tokenizer, output_dir):
    options = {"assistant_only_loss": True, "learning_rate": 1e-2, "max_steps": 30, "packing": packing}
    trainer = make_sft_trainer(folder, output_dir, conversations, **options)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] > 4 and losses[-1] < 0.1, losses

    trainer.save_model()
    tuned = hfllm.GPTForCausalLM.from_pretrained(output_dir).eval()
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for turns in CONVERSATIONS:
        *before, (_, answer) = turns
        messages = [{"role": role, "content": text} for role, text in before]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new_ids = tuned.generate(**prompt, max_new_tokens=30, do_sample=False, eos_token_id=end)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(new_ids) == answer + "<|im_end|>"


def test_a_prompt_with_its_completion_has_one_bos_and_only_the_completion_is_learned(folder, tokenizer, output_dir):
    pairs = Dataset.from_dict({"prompt": ["The sky is"], "completion": [" blue today"]})
    trainer = make_sft_trainer(folder, output_dir, pairs)
    prompt = tokenizer.encode("The sky is")
    completion = [*tokenizer.encode(" blue today", add_special_tokens=False), tokenizer.eos_token_id]
    assert prompt[0] == tokenizer.bos_token_id
    row = trainer.train_dataset[0]
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [-100] * len(prompt) + completion


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_dpo_learns_to_prefer_what_it_is_shown(with_lora, folder, model, tokenizer, output_dir):
    words = ["up", "left", "out", "here"]
    preferences = {
        "prompt": [f"Should I go {word}?" for word in words],
        "chosen": [f" Yes, go {word}." for word in words],
        "rejected": [" No, that is not allowed."] * len(words),
    }
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    trainer = trl.DPOTrainer(
        folder,  # the reference model is opened by this path too, unless an adapter can be switched off instead
        args=trl.DPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=len(words),
            max_steps=12,
            learning_rate=5e-3,
            **QUIET_TRAINING,
        ),
        train_dataset=Dataset.from_dict(preferences),
        processing_class=tokenizer,
        peft_config=lora if with_lora else None,
    )
    trainer.train()

    # Before the first update the policy is its own reference: no margin, a loss of ln 2 (Rafailov et al. 2023, eq. 7).
    margins, losses = logged(trainer, "rewards/margins"), logged(trainer, "loss")
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    for side in ("chosen", "rejected"):
        by_hand = []
        for prompt, answer in zip(preferences["prompt"], preferences[side]):
            ids = [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]
            by_hand.append(token_log_probs(model, ids)[len(tokenizer.encode(prompt)) - 1 :].sum().item())
        assert logged(trainer, f"logps/{side}")[0] == pytest.approx(sum(by_hand) / len(words), abs=1e-3)

    assert margins[-1] > 0.5, margins
    assert losses[-1] < 0.4, losses
    assert logged(trainer, "rewards/accuracies")[-1] == 1
