"""Classifier training: frozen parameters, the order of rows, and the Trainer."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoints import CheckpointedTrainer
from .order import RowOrder


HEADS = ("score", "classifier")  # names of a classifier's head in transformers


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


class ClassifierTrainer(CheckpointedTrainer):
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
        # A decisive word occurs in few texts: its row of the embedding is updated rarely, and needs large steps.
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
