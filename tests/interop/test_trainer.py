"""transformers' Trainer on our models: the loss is the same, however the batch is split."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import hfllm
from tests.interop.conftest import LINEAR_LAYERS, QUIET_TRAINING, logged, token_log_probs


NUM_TARGETS = [1, 19, 4, 11, 2, 16, 7, 13]  # labels of each row: very unequal


def make_rows() -> list[dict]:
    draw = torch.Generator().manual_seed(3)
    rows = []
    for num_targets in NUM_TARGETS:
        ids = torch.randint(5, 64, (20,), generator=draw)
        labels = ids.clone()
        labels[: 20 - num_targets] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def train(model, output_dir: str, rows_per_batch: int) -> Trainer:
    """Two updates of plain gradient descent from all eight rows each, in batches of this size."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=len(NUM_TARGETS) // rows_per_batch,
        max_steps=2,
        learning_rate=0.5,
        max_grad_norm=0.0,
        optim="sgd",
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        **QUIET_TRAINING,
    )
    trainer = Trainer(model, arguments, train_dataset=make_rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_the_loss_does_not_depend_on_how_a_batch_is_cut(with_lora, model, folder, output_dir):
    by_hand = torch.cat(
        [token_log_probs(model, row["input_ids"].tolist())[-num:] for row, num in zip(make_rows(), NUM_TARGETS)]
    )
    assert len(by_hand) == sum(NUM_TARGETS)

    trained = {}
    for rows_per_batch in (8, 2, 1):
        torch.manual_seed(7)
        started = hfllm.GPTForCausalLM.from_pretrained(folder)
        if with_lora:
            lora = LoraConfig(r=4, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
            started = get_peft_model(started, lora)
        trainer = train(started, output_dir, rows_per_batch)
        assert logged(trainer, "loss")[0] == pytest.approx(-by_hand.mean().item(), abs=1e-4)
        trained[rows_per_batch] = trainer.model.state_dict()
    for rows_per_batch in (2, 1):
        torch.testing.assert_close(trained[rows_per_batch], trained[8], atol=2e-5, rtol=1e-4)
