"""Chapter 7's bonus: teach a model which of two replies people prefer (DPO, Rafailov et al. 2023).

    python recipes/finetune_preference.py --model out/chat --dataset preferences.jsonl --output_dir out/preferred
    python recipes/chat.py --model out/preferred

A row has the columns prompt, chosen and rejected: texts, or lists of messages. TRL does the training
(`pip install -e '.[preference]'`): the policy's LoRA is trained so that, relative to the model it started from, the
chosen reply becomes likelier than the rejected one. The reference needs no second copy of the model: it is the same
model with the adapter switched off.
"""

import importlib.util
import logging
import math
import shlex
from pathlib import Path
from typing import Any

from hfllm.adapters import count_parameters, describe_trained, lora_config
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run
from hfllm.cli.opening import check_fit, open_causal_lm
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.conversations import load_preferences
from hfllm.data.templates import check_template, without_control_tokens
from hfllm.fine_tuning.checkpoints import CheckpointedTrainer
from hfllm.fine_tuning.run import open_run, training_arguments
from hfllm.runs.finite import check_converged
from hfllm.tokenization import load_tokenizer
from hfllm.training.devices import check_precision

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


@arguments
class PreferenceArguments(
    groups.TrainingDataset,
    groups.ValidationDataset,
    groups.BlockSize,
    groups.Model,
    groups.LoRA,
    groups.Precision,
    groups.Training,
    groups.Run,
    groups.SaveSteps,
    groups.Config,
):
    dataset = differs(None, help="Hub id or local files, with the columns prompt, chosen and rejected.")
    validation_fraction = differs(0.1, help="Share held out for validation, by whole prompts.", at_least=None, above=0)
    block_size = differs(help="Longest prompt with its reply, in tokens.")
    model = differs("out/chat", help="Folder or Hub id of a model that chats; also the reference.")
    beta: float = option(
        0.1, section="optimization", help="KL penalty strength (DPO's beta); the book uses 0.1.", above=0
    )
    per_device_train_batch_size = differs(help="Pairs per device and forward pass.")
    learning_rate = differs(5e-5)
    seed = differs(help="Random seed of the split, the order of rows and LoRA's initial weights.")
    output_dir = differs("out/preferred")

    def check(self) -> None:
        check_numbers(self)
        check_recipe(self)
        check_precision()
        if importlib.util.find_spec("trl") is None:
            raise ValueError("TRL is not installed: pip install -e '.[preference]'.")
        if self.dataset is None:
            raise ValueError("--dataset: give a Hub id or files whose rows have prompt, chosen and rejected.")


def main(args: PreferenceArguments) -> None:
    args.check()
    from trl import DPOConfig, DPOTrainer

    class PreferenceTrainer(CheckpointedTrainer, DPOTrainer):
        """TRL's trainer with this project's checkpoints."""

    with open_run(args, recipe="finetune_preference") as this_run:
        # 1. The model, which is also the reference, and its tokenizer
        tokenizer = load_tokenizer(args.model)
        check_template(tokenizer)
        model = open_causal_lm(args.model, dtype=torch.float32)
        check_fit(model.config, num_ids=len(tokenizer), block_size=args.block_size)
        stop_ids = model.generation_config.eos_token_id

        # 2. Pairs of replies to one prompt, rendered by the model's own chat template
        training, validation, account = load_pairs(args, tokenizer)
        if this_run.is_finished(model, tokenizer, {"train": training, **validation}):
            return
        if this_run.is_main:
            print(
                f"{account['rows']:,} preferences ({account['bad_records']:,} bad rows left out): {len(training):,} to "
                f"train on, {len(validation['eval']):,} to validate, split by prompts."
            )

        # 3. DPO: TRL's trainer, with LoRA as the only difference between the policy and the reference
        trainer = PreferenceTrainer(
            model,
            args=training_arguments(
                args,
                kind=DPOConfig,
                max_length=args.block_size or min(getattr(model.config, "max_position_embeddings", 1024), 1024),
                per_device_eval_batch_size=args.per_device_train_batch_size,
            ),
            train_dataset=training,
            eval_dataset=validation["eval"],
            processing_class=tokenizer,
            peft_config=lora_config(model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout),
        )
        this_run.begin(trainer)
        if this_run.is_main:
            print(describe_trained(trainer.model))

        # 4. Evaluation, training, evaluation. At first the policy equals the reference: margins of 0, a loss of ln 2.
        before = trainer.evaluate()
        this_run.train(trainer)
        parts: dict[str, float] = {}  # of several validation datasets, each by its name
        for side in sorted(validation.keys() - {"eval"}):
            name = side.removeprefix("eval")
            numbers = trainer.evaluate(validation[side], metric_key_prefix=side)
            parts |= select_numbers({**numbers, "eval_loss": numbers[f"{side}_loss"]}, name)
        after = trainer.evaluate()
        check_converged(after["eval_loss"], num_choices=2, before=before["eval_loss"])

        # 5. The adapter merged into the model, and the adapter alone beside it
        num_trained, num_parameters = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        model.generation_config.eos_token_id = stop_ids
        metrics = {
            **account,
            **select_numbers(before, "_before"),
            **select_numbers(after, ""),
            **parts,
            "beta": args.beta,
            "train_steps": trainer.state.global_step,
            "seed": args.seed,
            "num_parameters": num_parameters,
            "num_trained_parameters": num_trained,
        }
        with this_run.writing() as folder:
            this_run.save_model(trainer, tokenizer, folder)
            this_run.save_metrics(metrics, folder)
        this_run.finish(trainer)
        if this_run.is_main:
            report(metrics, this_run.output_dir)


def load_pairs(
    args: PreferenceArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Dataset], dict[str, Any]]:
    """The pairs to train on and to validate on, as TRL reads them, and an account of the rows that were read.

    Those to validate on are the side "eval"; each of several datasets is a side of its own as well, such as "eval_fr".
    """
    training, validation, account = load_preferences(
        args.dataset or "",
        dataset_config=args.dataset_config,
        split=args.split,
        on_bad_record=args.on_bad_record,
        delimiter=args.delimiter,
        exclude=[args.output_dir],
        validation_fraction=args.validation_fraction,
        validation_dataset=args.validation_dataset,
        seed=args.seed,
    )

    def as_dataset(side: list[dict[str, Any]]) -> Dataset:
        return Dataset.from_list(
            [{name: without_control_tokens(messages, tokenizer) for name, messages in row.items()} for row in side]
        )

    return as_dataset(training), {side: as_dataset(rows) for side, rows in validation.items()}, account


def select_numbers(evaluation: dict[str, float], when: str) -> dict[str, float]:
    """TRL's numbers by our names: the loss, the share of pairs whose chosen reply gained more, and the margin."""
    names = {
        "eval_loss": "eval_loss",
        "eval_rewards/accuracies": "eval_reward_accuracy",
        "eval_rewards/margins": "eval_reward_margin",
    }
    return {f"{ours}{when}": evaluation[theirs] for theirs, ours in names.items()}


def report(metrics: dict[str, Any], output_dir: Path) -> None:
    print(
        f"On held-out pairs, before: loss {metrics['eval_loss_before']:.4f} (ln 2 is {math.log(2):.4f}), margin "
        f"{metrics['eval_reward_margin_before']:.4f}.\n"
        f"After: loss {metrics['eval_loss']:.4f}, margin {metrics['eval_reward_margin']:.4f}; the chosen reply gained "
        f"more than the rejected one in {metrics['eval_reward_accuracy']:.1%} of the pairs.\n\n"
        f"Next, talk to it:\n    python recipes/chat.py --model {shlex.quote(str(output_dir))}"
    )


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run(main, PreferenceArguments, description=__doc__)
