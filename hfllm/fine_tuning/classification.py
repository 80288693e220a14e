"""Classifier training: frozen parameters, the head of a regression, the order of rows, and the Trainer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..evaluation.classification import pool_windows
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


@torch.no_grad()
def start_at_mean(model: PreTrainedModel, numbers: np.ndarray, *, is_new_head: bool = True) -> float:
    """Let a new head say about the mean of these numbers, in their own unit; returns the scale of what it has to learn.

    The scale is the numbers' root-mean-square distance from their mean, or from zero for the heads of transformers,
    which have no bias. A new head's weights, drawn for numbers about as large as one, are multiplied by it. A head that
    was trained for such numbers stays as it is.
    """
    head = next(module for name, module in model.named_modules() if name in HEADS)
    start = 0.0 if head.bias is None else float(numbers.mean())
    scale = float(np.sqrt(np.square(numbers - start).mean()))
    if is_new_head:
        head.weight.mul_(scale)
        if head.bias is not None:
            head.bias.fill_(start)
    return scale


class ClassifierTrainer(CheckpointedTrainer):
    """Trainer with the same steps and numbers on any number of processes, which counts text and padding.

    Rows come in `RowOrder`, in batches of one optimizer step on all processes together. The new head and, if they are
    trained, the token embeddings learn with `head_learning_rate`.

    `score` takes the logits (N, labels) and labels of N texts and returns the numbers of an evaluation, among them
    `loss`. Each text counts once: the logits of its windows, rows with the same `text_number`, are pooled.

    `target_scale` is that of `start_at_mean`. With it, training takes the very steps that it would take towards numbers
    divided by the scale, and yet the weights are those of the numbers as they are, in each checkpoint too.
    """

    num_tokens = num_places = 0  # of this process

    def __init__(
        self,
        *args: Any,
        head_learning_rate: float,
        score: Callable[[np.ndarray, np.ndarray], dict[str, float]],
        target_scale: float = 1.0,
        **kwargs: Any,
    ):
        self.head_learning_rate = head_learning_rate
        self.score = score
        self.target_scale = target_scale
        super().__init__(*args, compute_metrics=lambda prediction: {}, **kwargs)  # with it, Trainer keeps the logits
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
        scales = {id(weight): 1.0 for weight in self.model.get_input_embeddings().parameters()}
        scales |= {id(weight): self.target_scale for module in heads for weight in module.parameters()}
        for group in list(optimizer.param_groups):
            params = group["params"]
            group["params"] = [weight for weight in params if id(weight) not in scales]
            for scale in sorted(set(scales.values())):
                chosen = [weight for weight in params if scales.get(id(weight)) == scale]
                if chosen:
                    # Of a weight that is `scale` times as large, the gradient is smaller by `scale`, and a step is to
                    # be larger by it; the share of the weight that decays in a step stays the same.
                    own = {"lr": self.head_learning_rate * scale, "weight_decay": group["weight_decay"] / scale}
                    optimizer.add_param_group({**group, "params": chosen, **own})
                if scale != 1:
                    for weight in chosen:
                        weight.register_hook(lambda gradient, scale=scale: gradient * scale)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, *outputs = result if return_outputs else (result,)
        loss = loss / self.target_scale**2
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs, *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["loss"] *= self.target_scale**2  # in the unit of eval_loss
        super().log(logs, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> list[int]:
        """Longest rows first, so that those of a batch have about the same length."""
        return np.argsort(-np.array(eval_dataset["length"]), kind="stable").tolist()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.num_tokens += inputs["attention_mask"].sum()
        self.num_places += inputs["attention_mask"].numel()
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = dataloader.dataset
        text_numbers = np.array(rows["text_number"])[self._get_eval_sampler(rows)]
        _, first_rows = np.unique(text_numbers, return_index=True)
        scores = self.score(pool_windows(output.predictions, text_numbers), output.label_ids[first_rows])
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def count_tokens(self) -> tuple[int, int]:
        """The number of text tokens in the training batches of all processes, and of places with padding."""
        counts = torch.tensor([int(self.num_tokens), self.num_places], device=self.args.device)
        tokens, places = self.accelerator.reduce(counts, reduction="sum").tolist()
        return tokens, places
