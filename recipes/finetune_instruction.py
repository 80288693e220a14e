"""Chapter 7: teach a pretrained model to follow instructions.

Offline, on questions about the running Python (about four minutes on two cores whose CPU has bfloat16):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --mixed_precision bf16 \\
        recipes/finetune_instruction.py --config recipes/configs/instruction_python.yaml \\
        --model out/demo --output_dir out/chat
    python recipes/chat.py --model out/chat

On the book's 1,100 instructions, or any rows of one of the published forms. A base model such as GPT-2 needs a chat
template; the book's prompt is "alpaca":

    python recipes/finetune_instruction.py --config recipes/configs/instruction_book.yaml \\
        --model openai-community/gpt2 --chat_template alpaca --dataset instruction-data.json --output_dir out/assistant

On eight GPUs:

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 recipes/finetune_instruction.py \\
        --config recipes/configs/instruction_book.yaml --model out/demo --dataset instruction-data.json \\
        --output_dir out/assistant

A row has the columns instruction, input and output (Alpaca), or prompt and response, or `messages`, or `conversations`
(ShareGPT). The loss is on the responses alone. By default LoRA trains small matrices beside the frozen weights
(chapter 7.0); `--method full` trains all of them. The same command again resumes an interrupted run.
"""

import dataclasses
import functools
import math
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hfllm.adapters import add_lora, count_parameters, describe_trained
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run
from hfllm.cli.opening import check_fit, open_causal_lm
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data.conversations import (
    Conversation,
    further_questions,
    join_turns,
    load_conversations,
    reword_questions,
    shared_prompts,
    split_conversations,
)
from hfllm.data.instruction import (
    ConversationRows,
    check_packing,
    encode_conversations,
    mark_learned,
    padding_token_id,
)
from hfllm.data.sources import load_sides
from hfllm.data.templates import TEMPLATES, check_template, choose_template
from hfllm.evaluation.replies import Reply, answer, exact_match, stop_at_turns
from hfllm.evaluation.rows import score_rows
from hfllm.fine_tuning.checkpoints import CheckpointedTrainer
from hfllm.fine_tuning.instruction import (
    choose_eval_steps,
    choose_num_epochs,
    describe_learning,
    describe_samples,
)
from hfllm.fine_tuning.responses import learned_loss, logits_only_at, shift_left
from hfllm.fine_tuning.run import open_run, training_arguments
from hfllm.runs.finite import check_converged
from hfllm.tokenization import load_tokenizer
from hfllm.training.devices import check_precision
from hfllm.training.optimization import build_muon

import numpy as np
import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase


# The book trains all weights with 5e-5 (GPT-2 355M) and LoRA with 5e-5 to 8e-4. Muon's rate is for the demo's model.
LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "muon": 0.02}


@arguments
class InstructionArguments(
    groups.TrainingDataset,
    groups.ValidationDataset,
    groups.TestFraction,
    groups.TestDataset,
    groups.ColumnMap,
    groups.BlockSize,
    groups.Model,
    groups.Method,
    groups.LoRA,
    groups.GradientCheckpointing,
    groups.Precision,
    groups.Training,
    groups.Muon,
    groups.Schedule,
    groups.EarlyStopping,
    groups.EvalSteps,
    groups.KeepBest,
    groups.EvalBatch,
    groups.Replies,
    groups.NumSamples,
    groups.NewTokens,
    groups.Run,
    groups.SaveSteps,
    groups.Trackers,
    groups.Config,
):
    # Text
    dataset = differs(help="Hub id, local files, or 'stdlib': questions about this Python.")
    validation_fraction = differs(help="Share held out to follow the loss, by whole prompts.", at_least=None, above=0)
    test_fraction = differs(help="Share held out for the numbers at the end, by whole prompts.")
    num_further_questions: int = option(
        0,
        section="text",
        help="Further expressions of stdlib to train on, besides its 12,000; none of them is held out.",
        at_least=0,
    )
    reword_questions: bool = option(
        False,
        section="text",
        help="Ask half of stdlib's training expressions in other words, e.g. 3 + 4, What is 3 + 4?",
    )
    max_turns: int = option(
        1,
        section="text",
        help="Join the training questions at random into conversations of 1 to this many turns, each question once, so "
        "that later turns of a chat are learned too.",
        at_least=1,
    )
    train_on_prompt: bool = option(False, section="text", help="Also learn what the user says.")
    packing: bool = option(
        True, section="text", help="Several conversations per row; false: batches of conversations of similar length."
    )
    block_size = differs(default_is="the model's context, at most 1,024", at_least=2)

    # Model
    model = differs(help="Folder or Hub id of a pretrained model.")
    chat_template: str | None = option(
        None,
        section="model",
        help=f"How conversations are written: {', '.join(TEMPLATES)}, or a Jinja file.",
        default_is="the tokenizer's",
        location=Location.READ_OR_NAMED,
    )
    method: Literal["lora", "full"] = differs(help="Train small matrices beside the frozen weights, or all weights.")

    # Optimization
    num_train_epochs = differs(None, default_is="2 to 20, more for small data")
    optimizer: Literal["adamw", "muon"] = differs(help="Optimizer; muon needs method full.")
    learning_rate = differs(None, default_is=", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items()))
    adam_learning_rate = differs(None, default_is="half of learning_rate")
    lr_scheduler_type = differs("cosine")
    weight_decay = differs(0.0)
    seed = differs(help="Random seed of the split, the order of rows and LoRA's initial weights.")

    # Evaluation
    eval_steps = differs(None, default_is="a tenth of the run, at most 100")
    load_best_model_at_end = differs(True)
    per_device_eval_batch_size = differs(help="Rows, or prompts to answer, per device in evaluation.")
    check_answers = differs(None, default_is="true for stdlib")
    num_samples = differs(8, help="Test prompts answered before and after training, side by side.", at_least=0)
    max_answers: int = option(
        1000, section="evaluation", help="Most test prompts answered to compare the replies.", at_least=1
    )

    # Output
    output_dir = differs("out/chat")
    report_to = differs(help="Experiment trackers, by transformers' names, e.g. tensorboard trackio wandb.")

    def check(self) -> None:
        """Validate options that do not need the conversations."""
        check_numbers(self)
        check_recipe(self)
        check_precision()
        if self.num_further_questions and self.dataset != "stdlib":
            raise ValueError("--num_further_questions: only --dataset stdlib has further questions.")
        if self.reword_questions and self.dataset != "stdlib":
            raise ValueError("--reword_questions: only questions of --dataset stdlib can be reworded.")
        if self.optimizer == "muon" and self.method != "full":
            raise ValueError(
                "--optimizer muon updates whole weight matrices: it needs --method full. With --method lora, give "
                "--optimizer adamw."
            )
        if self.adam_learning_rate is not None and self.optimizer != "muon":
            raise ValueError("--adam_learning_rate: only --optimizer muon has a second learning rate.")


class InstructionTrainer(CheckpointedTrainer):
    """Trainer that computes logits only where something is learned, and evaluates by a sum over tokens.

    Trainer's own evaluation is a mean of batch means, which depends on the batch size.
    """

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args, **kwargs):
        with logits_only_at(self.accelerator.unwrap_model(model), shift_left(inputs["labels"]) != -100):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset: ConversationRows | None = None, *args, metric_key_prefix: str = "eval", **kwargs):
        metrics = {f"{metric_key_prefix}_loss": response_loss(self, eval_dataset or self.eval_dataset)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main(args: InstructionArguments) -> None:
    args.check()
    with open_run(args, recipe="finetune_instruction") as this_run:
        # 1. The model and its tokenizer, whose chat template says how a conversation is written
        tokenizer = load_tokenizer(args.model)
        template_note = choose_template(tokenizer, args.chat_template)
        check_template(tokenizer)
        # Training needs float32 weights, in whatever precision the checkpoint was saved.
        model = open_causal_lm(args.model, dtype=torch.float32)
        block_size = choose_block_size(args, model, tokenizer)

        # 2. Conversations to token ids, and the mask of what is learned
        sides, description = load_data(args)
        rows = {name: encode_side(args, name, side, tokenizer, block_size) for name, side in sides.items()}
        if args.packing:
            check_packing(model, rows["train"])
        learned = {
            name: [(row.input_ids.tolist(), row.is_learned.tolist()) for row in side.encoded.rows]
            for name, side in rows.items()
        }
        if this_run.is_finished(model, tokenizer, learned):
            return
        # From now on `generate` stops at the end of a turn, and at the end of a document.
        stop_at_turns(model, tokenizer, stop_token_id=rows["train"].encoded.stop_token_id)

        # 3. What is trained: LoRA's small matrices beside the frozen weights, or all weights
        if args.method == "lora":
            model = add_lora(
                model,
                r=args.lora_r,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                gradient_checkpointing=args.gradient_checkpointing,
            )
        elif args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer = make_trainer(args, model, rows)
        this_run.begin(trainer, "validation {eval_loss:.4f} nats per response token".format_map)
        if this_run.is_main:
            print(describe_data(args, template_note, description, sides, rows, tokenizer))
            print(describe_trained(model), flush=True)

        # 4. The model's replies before training
        questions = [sides["test"][row.index] for row in rows["test"].encoded.rows]
        samples = pick_samples(questions, args.num_samples)
        replies_to = functools.partial(
            answer,
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            batch_size=4 * args.per_device_eval_batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        before = replies_to(samples)
        metrics: dict[str, Any] = {
            "eval_loss_before": response_loss(trainer, rows["eval"]),
            "test_loss_before": response_loss(trainer, rows["test"]),
        }

        # 5. Training: transformers' Trainer, which divides the summed loss by the number of learned tokens, for any
        #    accumulation and number of processes
        metrics["train_seconds"] = round(this_run.train(trainer), 1)

        # 6. Its replies after training
        metrics["eval_loss"] = response_loss(trainer, rows["eval"])
        check_converged(metrics["eval_loss"], num_choices=len(tokenizer), before=metrics["eval_loss_before"])
        metrics["test_loss"] = response_loss(trainer, rows["test"])
        for name in sorted(rows.keys() - {"train", "eval", "test"}):  # "eval_fr": one of several validation datasets
            side, _, dataset = name.partition("_")
            metrics[f"{side}_loss_{dataset}"] = response_loss(trainer, rows[name])
        if args.check_answers if args.check_answers is not None else args.dataset == "stdlib":
            metrics |= {"test_questions": len(questions), **check_answers(args, questions, replies_to)}
        after = replies_to(samples)

        # 7. The model in the form that other tools open: LoRA merged into the weights, and beside it the adapter alone
        metrics |= describe_training(args, trainer, rows["train"])
        with this_run.writing() as folder:
            this_run.save_model(trainer, tokenizer, folder)
            this_run.save_metrics(metrics, folder)
            if this_run.is_main:
                if args.method == "lora" and args.chat_template is not None:  # the base's tokenizer does not have it
                    tokenizer.save_pretrained(folder / "adapter")
                text = describe_samples(samples, before, after)
                (folder / "samples.txt").write_text(text, encoding="utf-8")
                print(f"\n{text}")
        this_run.finish(trainer)
        if this_run.is_main:
            report(args, metrics, this_run.output_dir)
            print(f"\n{describe_learning(metrics, samples, after)}")


def choose_block_size(args: InstructionArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    context = getattr(model.config, "max_position_embeddings", 1024)
    check_fit(model.config, num_ids=len(tokenizer), block_size=args.block_size)
    if args.block_size == 1:
        raise ValueError(f"--block_size 1: choose 2 to {context:,}, the model's context.")
    return args.block_size or min(context, 1024)


def load_data(args: InstructionArguments) -> tuple[dict[str, list[Conversation]], str]:
    """The conversations of the sides "train", "eval" and "test", and a description of them.

    If several datasets are given for a side, each is also a side of its own, such as "eval_fr".
    """
    column_map = {}
    for each in args.column_map or []:
        name, equals, meaning = each.partition("=")
        if not (name and equals and meaning):
            raise ValueError(f"--column_map {each}: give name=meaning, e.g. question=prompt answer=response")
        column_map[name] = meaning
    reading: dict[str, Any] = {"column_map": column_map, "on_bad_record": args.on_bad_record, "seed": args.seed}
    reading |= {"delimiter": args.delimiter, "exclude": [args.output_dir]}
    conversations = load_conversations(args.dataset, dataset_config=args.dataset_config, split=args.split, **reading)
    given: dict[str, list[Conversation]] = {}
    for side, dataset in (("eval", args.validation_dataset), ("test", args.test_dataset)):
        given |= load_sides(side, dataset, lambda name: load_conversations(name, **reading).rows)
    train, validation, test = split_conversations(
        conversations.rows,
        validation_fraction=0 if "eval" in given else args.validation_fraction,
        test_fraction=0 if "test" in given else args.test_fraction,
        seed=args.seed,
    )
    held_out = {"eval": validation, "test": test} | given
    description = conversations.description
    for side, rows in given.items():
        if num_shared := shared_prompts(train, rows):
            description += f"; {num_shared:,} of {len(rows):,} {side} conversations begin with a prompt of training"
    if args.num_further_questions:
        known = [*train, *held_out["eval"], *held_out["test"]]
        further = further_questions(args.num_further_questions, seed=args.seed, held_back=known)
        train = train + further
        description += f"; {len(further):,} further expressions to train on"
    if args.reword_questions:
        train = reword_questions(train, seed=args.seed)
        description += "; the expressions to train on are asked in several wordings"
    if args.max_turns > 1:
        train = join_turns(train, max_turns=args.max_turns, seed=args.seed)
    return {"train": train} | held_out, description


def encode_side(
    args: InstructionArguments,
    name: str,
    side: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> ConversationRows:
    """Rows of token ids with the mask of learned tokens; evaluation always scores the responses alone."""
    on_prompt = args.train_on_prompt and name == "train"
    encoded = encode_conversations(side, tokenizer, max_length=block_size, train_on_prompt=on_prompt)
    return ConversationRows(
        encoded, block_size=block_size, pad_token_id=padding_token_id(tokenizer), packing=args.packing
    )


def make_trainer(
    args: InstructionArguments, model: torch.nn.Module, rows: dict[str, ConversationRows]
) -> InstructionTrainer:
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    num_epochs = args.num_train_epochs or choose_num_epochs(len(rows["train"]), rows_per_step=rows_per_step)
    num_steps = args.max_steps or math.ceil(num_epochs * math.ceil(len(rows["train"]) / rows_per_step))
    eval_steps = args.eval_steps or choose_eval_steps(num_steps)
    arguments = training_arguments(
        args,
        num_train_epochs=num_epochs,
        learning_rate=learning_rate_of(args),
        train_sampling_strategy="random" if args.packing else "group_by_length",
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_steps=eval_steps if args.load_best_model_at_end else args.save_steps,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=args.early_stopping_patience is not None,
    )
    stopping = [EarlyStoppingCallback(args.early_stopping_patience)] if args.early_stopping_patience else []
    return InstructionTrainer(
        model,
        arguments,
        optimizers=(muon(args, model) if args.optimizer == "muon" else None, None),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        data_collator=rows["train"].collate,
        compute_loss_func=learned_loss,
        callbacks=stopping,
    )


def learning_rate_of(args: InstructionArguments) -> float:
    if args.learning_rate is not None:
        return args.learning_rate
    return LEARNING_RATES["muon" if args.optimizer == "muon" else args.method]


def muon(args: InstructionArguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    learning_rate = learning_rate_of(args)
    return build_muon(
        model,
        learning_rate=learning_rate,
        adam_learning_rate=learning_rate / 2 if args.adam_learning_rate is None else args.adam_learning_rate,
        weight_decay=args.weight_decay,
        momentum=0.95,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        dtype=torch.bfloat16 if args.bf16 else None,
        process_group=torch.distributed.group.WORLD,  # DDP's processes share the work; None for a single one
    )


def response_loss(trainer: InstructionTrainer, rows: ConversationRows) -> float:
    """Nats per token of the responses: a sum over the learned tokens of all rows divided by their count."""
    batch_size = trainer.args.per_device_eval_batch_size
    loss, _ = score_rows(
        trainer.model, rows, np.arange(len(rows)), batch_size=batch_size, accelerator=trainer.accelerator
    )
    return loss


def pick_samples(questions: list[Conversation], number: int) -> list[Conversation]:
    """Some test questions, as evenly from all kinds as possible."""
    seen: Counter[str | None] = Counter()
    order = []
    for position, question in enumerate(questions):
        seen[question.kind] += 1
        order.append((seen[question.kind], position))
    return [questions[position] for _, position in sorted(order)[:number]]


def check_answers(
    args: InstructionArguments, questions: list[Conversation], replies_to: Callable[[list[Conversation]], list[Reply]]
) -> dict[str, float]:
    """Exact match on the test questions, and on variants of the same questions.

    The variants: in other words, and in a chat after another question with its right answer.
    """
    asked = questions[: args.max_answers]
    numbers = exact_match(asked, replies_to(asked))
    others = {}
    if args.reword_questions:
        pairs = zip(asked, reword_questions(asked, seed=args.seed), strict=True)
        others["reworded"] = [reworded for question, reworded in pairs if reworded.messages != question.messages]
    if args.max_turns > 1 and args.dataset == "stdlib":
        others["second_turn"] = [
            dataclasses.replace(question, messages=[*before.messages, *question.messages])
            for before, question in zip([asked[-1], *asked], asked)
        ]
    for name, variant in others.items():
        if variant:  # among a few questions, perhaps none can be reworded
            numbers[f"test_exact_match_{name}"] = exact_match(variant, replies_to(variant))["test_exact_match"]
    return numbers


def describe_data(
    args: InstructionArguments,
    template_note: str | None,
    description: str,
    sides: dict[str, list[Conversation]],
    rows: dict[str, ConversationRows],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    training, encoded = rows["train"], rows["train"].encoded
    how = "one conversation per row, rows of similar length in a batch"
    if args.packing:
        how = f"packed into {len(training):,} rows of up to {training.block_size}, {training.packing_waste:.1%} empty"
    lines = [template_note] if template_note else []
    lines += [
        description,
        f"Split by prompts: {len(sides['train']):,} to train on, {len(sides['eval']):,} to validate, "
        f"{len(sides['test']):,} to test.",
        f"Training: {encoded.summary()}; {how}.",
        "The first conversation, with what is learned between >> and <<:\n",
        mark_learned(encoded.rows[0], tokenizer),
    ]
    return "\n".join(lines)


def describe_training(
    args: InstructionArguments, trainer: InstructionTrainer, rows: ConversationRows
) -> dict[str, Any]:
    """Cost and size of the training, for `metrics.json`."""
    best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
    runtime = next((entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry), None)
    trained, total = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return {
        **{f"train_{name}": number for name, number in rows.encoded.account.items()},
        "train_rows": len(rows),
        "train_padding_share": rows.seen_padding_share,
        "train_steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_checkpoint": best and Path(best).name,
        "tokens_per_second": round(rows.tokens_seen * trainer.args.world_size / runtime, 1) if runtime else None,
        "num_parameters": total,
        "num_trained_parameters": trained,
        "method": args.method,
        "dataset": args.dataset,
        "seed": args.seed,
    }


KINDS = {"reworded": "expressions in other words", "second_turn": "all kinds as the second turn of a chat"}


def report(args: InstructionArguments, metrics: dict[str, Any], output_dir: Path) -> None:
    print(
        f"Loss in nats per response token (prompts do not count): validation {metrics['eval_loss_before']:.4f} before, "
        f"{metrics['eval_loss']:.4f} after; test {metrics['test_loss_before']:.4f} before, {metrics['test_loss']:.4f} "
        "after."
    )
    if "test_exact_match" in metrics:
        prefix = "test_exact_match_"
        shares = {name.removeprefix(prefix): share for name, share in metrics.items() if name.startswith(prefix)}
        kinds = ", ".join(f"{KINDS.get(kind, kind)} {share:.1%}" for kind, share in shares.items())
        print(
            f"Exact match on {metrics['test_answers']:,} of {metrics['test_questions']:,} test questions, none of "
            f"which was in training: {metrics['test_exact_match']:.1%}{f' ({kinds})' if kinds else ''}. "
            f"{metrics['test_answers_unfinished']:,} replies had no end after --max_new_tokens {args.max_new_tokens}, "
            f"{metrics['test_answers_empty']:,} were empty."
        )
    adapter = f"{output_dir}/adapter             LoRA's matrices alone\n" if args.method == "lora" else ""
    print(
        f"{metrics['train_steps']:,} steps ({metrics['epochs']:.1f} epochs) in "
        f"{metrics['train_seconds'] / 60:.1f} minutes with evaluations: {metrics['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['train_padding_share']:.1%} padding.\n\n"
        f"{output_dir}/model.safetensors   the model, with its tokenizer and code beside it\n{adapter}"
        f"{output_dir}/samples.txt         replies before and after; metrics.json has the numbers\n"
        f"{output_dir}/report.html         the run's page, to open in a browser\n\n"
        f"Next, talk to it:\n    python recipes/chat.py --model {shlex.quote(str(output_dir))}"
    )


if __name__ == "__main__":
    run(main, InstructionArguments, description=__doc__)
