"""Classifier training: frozen parameters, the order of rows, and the Trainer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer


HEADS = ("score", "classifier")  # names of a classifier's head in transformers
BATCHES_IN_A_POOL = 50  # rows of so many batches are sorted by length together


def freeze_all_but(model: PreTrainedModel, method: str) -> None:
    """Freeze, in place, what the method does not train.

    `full` trains all parameters, `last_block` the last block, the last norm and the head, `head` the head alone.
    """
    if method not in ("full", "last_block", "head"):
        raise ValueError(f"method={method!r}: choose 'full', 'last_block' or 'head'.")
    body = model.base_model
    body.requires_grad_(method == "full")
    if method != "last_block":
        return
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"A {type(model).__name__} has no list of blocks: choose method full or head.")
    blocks = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    blocks[-1].requires_grad_(True)
    inside = {id(parameter) for parameter in blocks.parameters()}
    for parameter in body.parameters():
        if parameter.ndim == 1 and id(parameter) not in inside:  # the norm after the blocks
            parameter.requires_grad_(True)


class RowOrder(Sampler[int]):
    """The order of an epoch's rows, in whole batches; a function of seed and epoch, the same in every process.

    `by_length` puts rows of similar lengths into a batch, and the batches in random order. Batches from long to short
    would go from one label to another where length depends on the label (spam is long). Rows beyond the last whole
    batch, different ones in each epoch, are left out, so that every step is the mean over the same number of rows.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, by_length: bool, seed: int):
        self.lengths, self.batch_size, self.by_length, self.seed = lengths, batch_size, by_length, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size or len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))[: len(self)].tolist()
        if not self.by_length:
            return iter(order)
        pool = BATCHES_IN_A_POOL * self.batch_size
        order = [
            row
            for first in range(0, len(order), pool)
            for row in sorted(order[first : first + pool], key=lambda row: self.lengths[row])
        ]
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        return iter([row for index in generator.permutation(len(batches)) for row in batches[index]])


class ClassifierTrainer(Trainer):
    """Trainer with the same steps and numbers on any number of processes, which counts text and padding.

    Rows come in `RowOrder`, in batches of one optimizer step on all processes together. `eval_loss` is the mean over
    the texts, each counted once. The new head and, if they are trained, the token embeddings learn with
    `head_learning_rate`.
    """

    num_tokens = num_places = 0  # of this process

    def __init__(self, *args: Any, head_learning_rate: float, **kwargs: Any):
        self.head_learning_rate = head_learning_rate
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a classifier's loss is the mean over rows even if it takes **kwargs

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return RowOrder(
            self.train_dataset["length"],
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            by_length=self.args.train_sampling_strategy == "group_by_length",
            seed=self.args.seed,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        # A word that decides occurs in few texts: its row of the embedding is updated rarely, and needs large steps.
        optimizer = super().create_optimizer(model)
        heads = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] in HEADS]
        tables = {
            id(weight) for module in [self.model.get_input_embeddings(), *heads] for weight in module.parameters()
        }
        for group in list(optimizer.param_groups):
            chosen = [weight for weight in group["params"] if id(weight) in tables]
            group["params"] = [weight for weight in group["params"] if id(weight) not in tables]
            if chosen:
                optimizer.add_param_group({**group, "params": chosen, "lr": self.head_learning_rate})
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.num_tokens += inputs["attention_mask"].sum()
        self.num_places += inputs["attention_mask"].numel()
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics and output.label_ids is not None:
            logits = torch.from_numpy(output.predictions).double()
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(output.label_ids))
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        return output

    def count_tokens(self) -> tuple[int, int]:
        """The number of text tokens in the training batches of all processes, and of places with padding."""
        counts = torch.tensor([int(self.num_tokens), self.num_places], device=self.args.device)
        tokens, places = self.accelerator.reduce(counts, reduction="sum").tolist()
        return tokens, places
