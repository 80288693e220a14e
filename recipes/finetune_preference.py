"""Chapter 7's bonus: teach a model which of two replies people prefer (DPO, Rafailov et al. 2023).

    python recipes/finetune_preference.py --model out/chat --dataset preferences.jsonl --output_dir out/preferred
    python recipes/chat.py --model out/preferred

A row has the columns prompt, chosen and rejected: texts, or lists of messages. TRL does the work (`pip install
-e '.[preference]'`): the policy's LoRA is trained so that, compared with the model it started from, the chosen reply
becomes likelier than the rejected one. The reference needs no second copy of the model: it is the same one with the
adapter switched off.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # what imports leave is no garbage, and looking through it takes a fifth of the start: until `run`

import contextlib
import importlib.util
import json
import logging
import math
import shlex
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from hfllm.adapters import count_parameters, describe_trained, lora_config, merge_adapter, save_adapter
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run, save_arguments
from hfllm.cli.opening import check_fit, open_causal_lm
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.conversations import load_preferences
from hfllm.data.templates import check_template, without_control_tokens
from hfllm.fine_tuning.run import LogFile, newest_checkpoint, prepare_folder
from hfllm.hub import write_page_and_card
from hfllm.report import save_environment
from hfllm.runs.lock import run_lock
from hfllm.tokenization import load_tokenizer
from hfllm.training.devices import check_precision, keep_freed_memory


@arguments
class PreferenceArguments(
    groups.TrainingDataset,
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
    save_total_limit = differs(1)

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

    output_dir = Path(args.output_dir)
    is_main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    keep_freed_memory()
    disable_progress_bar()
    with run_lock(output_dir) if is_main else contextlib.nullcontext():
        # Whether the run is finished is the main process's answer, for all of them.
        [is_finished] = broadcast_object_list([is_main and prepare_folder(args)])
        if is_finished:
            return

        # 1. The model, which is also the reference, and its tokenizer
        tokenizer = load_tokenizer(args.model)
        check_template(tokenizer)
        set_seed(args.seed)
        model = open_causal_lm(args.model, dtype=torch.float32)
        check_fit(model.config, num_ids=len(tokenizer), block_size=args.block_size)
        stop_ids = model.generation_config.eos_token_id

        # 2. Pairs of replies to one prompt, rendered by the model's own chat template
        sides, account = load_pairs(args, tokenizer)
        if is_main:
            save_arguments(args, output_dir / "arguments.yaml")
            print(
                f"{account['rows']:,} preferences ({account['bad_records']:,} bad rows left out): {len(sides[0]):,} to "
                f"train on, {len(sides[1]):,} to validate, split by prompts."
            )

        # 3. DPO: TRL's trainer, with LoRA as the only difference between the policy and the reference
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=str(output_dir / "checkpoints"),
                beta=args.beta,
                max_length=args.block_size or min(getattr(model.config, "max_position_embeddings", 1024), 1024),
                num_train_epochs=args.num_train_epochs,
                max_steps=args.max_steps or -1,
                per_device_train_batch_size=args.per_device_train_batch_size,
                per_device_eval_batch_size=args.per_device_train_batch_size,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                learning_rate=args.learning_rate,
                warmup_steps=args.warmup_steps,
                bf16=args.bf16,
                seed=args.seed,
                logging_steps=args.logging_steps,
                save_steps=args.save_steps,
                save_total_limit=args.save_total_limit,
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
            ),
            train_dataset=sides[0],
            eval_dataset=sides[1],
            processing_class=tokenizer,
            peft_config=lora_config(model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout),
            callbacks=[LogFile(output_dir / "log.jsonl")],
        )
        trainer.remove_callback(PrinterCallback)  # log.jsonl has it all
        if is_main:
            save_environment(output_dir, num_processes=trainer.args.world_size)
            print(describe_trained(trainer.model))

        # 4. Before, training, after. Before the first update the policy is the reference: margins of 0, a loss of ln 2.
        before = trainer.evaluate()
        [last] = broadcast_object_list([newest_checkpoint(output_dir) if is_main else None])
        trainer.train(resume_from_checkpoint=last)
        after = trainer.evaluate()

        # 5. The adapter merged into the model, and beside it alone
        trained, total = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
        if is_main:
            policy = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(policy, output_dir / "adapter")
            merged = merge_adapter(policy)
            merged.generation_config.eos_token_id = stop_ids
            merged.config.use_cache = True
            merged.save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
            metrics = {**account, **numbers(before, "_before"), **numbers(after, ""), "beta": args.beta}
            metrics |= {"train_steps": trainer.state.global_step, "seed": args.seed}
            metrics |= {"num_parameters": total, "num_trained_parameters": trained}
            (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            write_page_and_card(output_dir)
            report(metrics, output_dir)
        trainer.accelerator.end_training()


def load_pairs(
    args: PreferenceArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Dataset, Dataset], dict[str, Any]]:
    training, validation, account = load_preferences(
        args.dataset or "",
        dataset_config=args.dataset_config,
        split=args.split,
        on_bad_record=args.on_bad_record,
        validation_fraction=args.validation_fraction,
        seed=args.seed,
    )
    sides = []
    for side in (training, validation):
        rows = [{name: without_control_tokens(row[name], tokenizer) for name in row} for row in side]
        sides.append(Dataset.from_list(rows))
    return (sides[0], sides[1]), account


def numbers(evaluation: dict[str, float], when: str) -> dict[str, float]:
    """TRL's numbers by our names: the loss, the share of pairs whose chosen reply gained more, and by how much."""
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
