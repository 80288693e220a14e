"""What each method trains, the order of rows, and the numbers that a classifier's training says."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainingArguments

import hfllm
from hfllm.adapters import add_lora
from hfllm.evaluation.classification import score_predictions
from hfllm.fine_tuning.classification import ClassifierTrainer, RowOrder, freeze_all_but, start_at_mean
from tests.conftest import make_tiny_config


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_method_trains_what_it_says(tiny_config):
    model = hfllm.GPTForSequenceClassification(tiny_config)
    every = trained_names(model)
    freeze_all_but(model, "head")
    assert trained_names(model) == {"score.weight"}
    freeze_all_but(model, "last_block")
    last = {name for name in every if name.startswith(("model.layers.1.", "model.norm."))}
    assert trained_names(model) == last | {"score.weight"} and len(last) > 5
    freeze_all_but(model, "full")
    assert trained_names(model) == every
    with pytest.raises(ValueError, match="method='most'"):
        freeze_all_but(model, "most")


def test_the_last_block_of_gpt2s_own_class_is_found_too():
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    freeze_all_but(model, "last_block")
    assert {name.rpartition(".")[0].split(".")[1] for name in trained_names(model) - {"score.weight"}} == {"h", "ln_f"}
    assert not any(name.startswith("transformer.h.0.") for name in trained_names(model))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_and_of_any_length_changes_nothing_even_where_pad_is_eos(side):
    """The attention mask finds the last token; by its id, an eos that is text would be taken for padding."""
    config = make_tiny_config("modern", pad_token_id=1, num_labels=3)
    model = hfllm.GPTForSequenceClassification(config).eval()
    text = torch.tensor([[5, 9, 1, 7, 1]])  # ends with eos, which is the pad token as well
    alone = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    for length in (1, 20):
        padding = torch.ones(1, length, dtype=torch.long)
        parts, mask = ([padding, text], [0 * padding, 0 * text + 1])
        if side == "right":
            parts, mask = parts[::-1], mask[::-1]
        padded = model(input_ids=torch.cat(parts, 1), attention_mask=torch.cat(mask, 1)).logits
        torch.testing.assert_close(padded, alone)


def test_a_new_head_is_drawn_as_other_weights_are_and_without_a_bias(tmp_path):
    hfllm.GPTForCausalLM(make_tiny_config("book", initializer_range=0.02)).save_pretrained(tmp_path)
    model = hfllm.GPTForSequenceClassification.from_pretrained(tmp_path, num_labels=40)
    assert model.score.bias is None and model.score.weight.dtype == torch.float32
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_a_batch_has_rows_of_about_equal_lengths_and_batches_come_in_random_order():
    """Trainer's own sampler goes from long texts to short ones, and so, where spam is long, from spam to ham."""
    lengths = np.random.default_rng(0).permutation(400) + 1
    order = list(RowOrder(lengths, batch_size=8, by_length=True, seed=3))
    batches = [lengths[order[first : first + 8]] for first in range(0, 400, 8)]
    assert sorted(order) == list(range(400))
    assert max(batch.max() - batch.min() for batch in batches) < 10
    means = [batch.mean() for batch in batches]
    assert abs(np.corrcoef(means, range(50))[0, 1]) < 0.4
    at_random = list(RowOrder(lengths, batch_size=8, by_length=False, seed=3))
    assert sorted(at_random) == list(range(400)) and np.mean([np.ptp(lengths[at_random[:8]])]) > 100


def test_the_order_is_a_function_of_seed_and_epoch_and_leaves_out_other_rows_in_each():
    def order(seed, epoch):
        rows = RowOrder(range(1, 21), batch_size=8, by_length=True, seed=seed)
        rows.set_epoch(epoch)
        assert len(rows) == 16
        return list(rows)

    assert order(1, 0) == order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    seen = [row for epoch in range(20) for row in order(1, epoch)]
    assert set(seen) == set(range(20)) and all(len(set(order(1, epoch))) == 16 for epoch in range(20))
    assert len(list(RowOrder([3, 1, 2], batch_size=8, by_length=True, seed=0))) == 3


def make_trainer(model, tmp_path, target_scale=1.0, numbers=None, **options) -> ClassifierTrainer:
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 64, generator.integers(3, 12)).tolist() for _ in range(35)]
    data = {"input_ids": rows, "length": list(map(len, rows)), "labels": [len(row) % 3 for row in rows]}
    data["text_number"] = list(range(len(rows)))
    if numbers is not None:
        data["labels"] = numbers

    def collate(batch):
        length = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [2] * (length - len(row["input_ids"])) for row in batch])
        mask = torch.tensor([[1] * row["length"] + [0] * (length - row["length"]) for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        learning_rate=1e-3,
        max_steps=4,
        train_sampling_strategy="group_by_length",
        disable_tqdm=True,
        **options,
    )
    dataset = Dataset.from_dict(data)

    def score(logits, labels):
        if numbers is not None:
            return {"loss": float(((logits[:, 0] - labels) ** 2).mean())}
        return {"loss": score_predictions(logits, labels, range(3))["loss"]}

    rates = {"head_learning_rate": 1e-2, "target_scale": target_scale}
    return ClassifierTrainer(model, arguments, collate, dataset, dataset, score=score, **rates)


@pytest.mark.parametrize(
    "model_class, smoothing",
    [
        (hfllm.GPTForSequenceClassification, 0.0),
        (hfllm.GPTForSequenceClassification, 0.1),
        (GPT2ForSequenceClassification, 0.0),
    ],
)
def test_a_step_is_the_same_in_one_forward_pass_as_in_several(model_class, smoothing, tmp_path):
    """Trainer alone would take the model's **kwargs for a promise to divide by the accumulation, and add up means."""
    weights, losses = [], []
    for rows, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        if model_class is GPT2ForSequenceClassification:
            sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
            dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            config = GPT2Config(**sizes, **dropouts, num_labels=3, pad_token_id=2)
        else:
            config = make_tiny_config("modern", num_labels=3, classifier_pooling="mean")
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        options["label_smoothing_factor"] = smoothing
        trainer = make_trainer(model_class(config), tmp_path, **options, logging_steps=1)
        trainer.train()
        weights.append({name: weight.clone() for name, weight in trainer.model.named_parameters()})
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=2e-5, rtol=1e-3)


def test_the_evaluations_loss_is_the_mean_over_the_texts_whatever_the_batches_and_smoothing(tmp_path):
    model = hfllm.GPTForSequenceClassification(make_tiny_config("book", num_labels=3)).eval()
    losses = []
    for rows, smoothing in ((1, 0.0), (16, 0.0), (16, 0.1)):
        options = {"per_device_eval_batch_size": rows, "label_smoothing_factor": smoothing}
        trainer = make_trainer(model, tmp_path, **options)
        losses.append(trainer.evaluate()["eval_loss"])
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(35)])
    assert losses == pytest.approx([model(**batch).loss.item()] * 3, rel=1e-5)

    smoothed = trainer.compute_loss(model, dict(batch)).item()
    expected = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1)
    assert smoothed == pytest.approx(expected.item(), rel=1e-5)


def test_the_head_and_trained_embeddings_take_steps_of_their_own(tmp_path):
    config = make_tiny_config("modern", num_labels=3)
    for change in (None, add_lora):
        model = hfllm.GPTForSequenceClassification(config)
        trainer = make_trainer(change(model, r=2) if change else model, tmp_path)
        names = {id(weight): name for name, weight in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        by_rate = {names[id(weight)]: group["lr"] for group in groups for weight in group["params"]}
        trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert set(by_rate) == trained
        fast = {name for name, rate in by_rate.items() if rate == 1e-2}
        if change:
            assert fast == {"base_model.model.score.modules_to_save.default.weight"}
        else:
            assert fast == {"score.weight", "model.embed_tokens.weight"}
        assert {rate for name, rate in by_rate.items() if name not in fast} == {1e-3}


@pytest.mark.parametrize("adapted", [False, True])
def test_numbers_in_another_unit_are_learned_by_the_same_steps_and_said_in_that_unit(adapted, tmp_path):
    numbers = np.random.default_rng(3).normal(2, 1.5, 35)
    said, losses = [], []
    for unit, zero in ((1.0, 0.0), (1000.0, -7000.0), (1e-3, 5.0)):
        torch.manual_seed(0)
        config = make_tiny_config("modern", num_labels=1, problem_type="regression", classifier_pooling="mean")
        model = hfllm.GPTForSequenceClassification(config)
        scale = start_at_mean(model, unit * numbers + zero)
        assert scale == pytest.approx(unit * numbers.std()) and model.score.bias.item() == pytest.approx(
            unit * numbers.mean() + zero, rel=1e-5
        )
        torch.manual_seed(1)
        model = add_lora(model, r=2) if adapted else model
        labels = (unit * numbers + zero).tolist()
        trainer = make_trainer(model, tmp_path, scale, labels, logging_steps=1, weight_decay=0.1, max_grad_norm=0.5)
        trainer.train()
        trainer.model.eval()
        batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(35)])
        with torch.no_grad():
            output = trainer.model(**batch)
        said.append((output.logits[:, 0].numpy() - zero) / unit)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append(np.array([*logged, trainer.evaluate()["eval_loss"]]) / unit**2)
        assert losses[-1][-1] == pytest.approx(output.loss.item() / unit**2, rel=1e-3)  # of transformers' own formula
    assert losses[0][-1] < losses[0][0]
    for other, loss in zip(said[1:], losses[1:]):
        assert other == pytest.approx(said[0], abs=5e-3) and loss == pytest.approx(losses[0], rel=5e-3)


def test_transformers_heads_without_a_bias_start_at_zero_with_the_numbers_size():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, num_labels=1, problem_type="regression")
    model = GPT2ForSequenceClassification(config)
    before = model.score.weight.clone()
    assert start_at_mean(model, np.array([30.0, 40.0, 50.0])) == pytest.approx(np.sqrt(5000 / 3))
    torch.testing.assert_close(model.score.weight, before * np.sqrt(5000 / 3))


def test_an_evaluation_counts_each_text_once_however_many_windows_it_has(tmp_path):
    """Texts of 1, 2 and 3 windows; the rows are evaluated in another order than they stand in."""
    model = hfllm.GPTForSequenceClassification(make_tiny_config("book", num_labels=3)).eval()
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=4)
    numbers = [0, 1, 1, 2, 2, 2]
    rows = trainer.eval_dataset.select(range(6)).remove_columns(["text_number", "labels"])
    rows = rows.add_column("text_number", numbers).add_column("labels", [[2, 0, 1][number] for number in numbers])
    with torch.no_grad():
        logits = torch.cat([model(**trainer.data_collator([row])).logits for row in rows])
    pooled = torch.stack([logits[0], logits[1:3].mean(0), logits[3:].mean(0)])
    expected = torch.nn.functional.cross_entropy(pooled, torch.tensor([2, 0, 1])).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
