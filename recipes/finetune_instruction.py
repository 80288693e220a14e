"""Chapter 7: teach a pretrained model to follow instructions.

Offline, on questions about the Python that runs (about four minutes on two cores whose CPU has bfloat16):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --mixed_precision bf16 \\
        recipes/finetune_instruction.py --config recipes/configs/instruction_python.yaml \\
        --model out/demo --output_dir out/chat
    python recipes/chat.py --model out/chat

On the book's 1,100 instructions, or any rows of one of the published forms. A base model such as GPT-2 needs to be told
how a conversation is written; the book's way is "alpaca":

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

import gc


if __name__ == "__main__":
    gc.disable()  # what imports leave is no garbage, and looking through it takes a fifth of the start: until `run`

import contextlib
import dataclasses
import functools
import json
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from hfllm.adapters import add_lora, count_parameters, describe_trained, merge_adapter, save_adapter
from hfllm.cli import options as groups
from hfllm.cli.arguments import check_recipe, run, save_arguments
from hfllm.cli.opening import check_fit, open_causal_lm
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data.conversations import (
    Conversation,
    further_questions,
    join_turns,
    load_conversations,
    reword_questions,
    split_conversations,
)
from hfllm.data.instruction import (
    ConversationRows,
    check_packing,
    encode_conversations,
    mark_learned,
    padding_token_id,
)
from hfllm.data.templates import TEMPLATES, check_template, choose_template
from hfllm.evaluation.replies import Reply, answer, exact_match, last_response, stop_at_turns
from hfllm.evaluation.rows import score_rows
from hfllm.fine_tuning.responses import learned_loss, logits_only_at, shift_left
from hfllm.fine_tuning.run import LogFile, newest_checkpoint, prepare_folder, trackers
from hfllm.hub import write_page_and_card
from hfllm.report import save_environment
from hfllm.runs.lock import run_lock
from hfllm.tokenization import load_tokenizer
from hfllm.training.devices import check_precision, keep_freed_memory
from hfllm.training.optimization import build_muon


# The book trains all weights with 5e-5 (GPT-2 355M) and LoRA with 5e-5 to 8e-4. Muon's is the demo's model's.
LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "muon": 0.02}


@arguments
class InstructionArguments(
    groups.TrainingDataset,
    groups.TestFraction,
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
    groups.EvalSteps,
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
        help="Further expressions of stdlib to train on beside its 12,000, none of which is held out.",
        at_least=0,
    )
    reword_questions: bool = option(
        False,
        section="text",
        help="Ask half of stdlib's training expressions in other words: 3 + 4, What is 3 + 4?",
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
    num_train_epochs = differs(2.0)
    optimizer: Literal["adamw", "muon"] = differs(help="Optimizer; muon needs method full.")
    learning_rate = differs(None, default_is=", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items()))
    adam_learning_rate = differs(None, default_is="half of learning_rate")
    lr_scheduler_type = differs("cosine")
    weight_decay = differs(0.0)
    seed = differs(help="Random seed of the split, the order of rows and LoRA's initial weights.")

    # Evaluation
    per_device_eval_batch_size = differs(help="Rows, or prompts to answer, per device in evaluation.")
    check_answers = differs(None, default_is="true for stdlib")
    num_samples = differs(8, help="Test prompts answered before and after training, side by side.", at_least=0)
    max_answers: int = option(
        1000, section="evaluation", help="Most test prompts answered to compare the replies.", at_least=1
    )

    # Output
    output_dir = differs("out/chat")
    save_total_limit = differs(1)
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


class InstructionTrainer(Trainer):
    """transformers' Trainer, which computes logits where something is learned, and evaluates by a sum over tokens.

    Its own evaluation is a mean of batch means, which is another number for any other batch size.
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
    output_dir = Path(args.output_dir)
    is_main = PartialState(cpu=not torch.accelerator.is_available()).is_main_process
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of loading and writing; training has its own
    keep_freed_memory()
    with run_lock(output_dir) if is_main else contextlib.nullcontext():
        # Whether the run is finished is the main process's answer, for all of them.
        [is_finished] = broadcast_object_list([is_main and prepare_folder(args)])
        if is_finished:
            return

        # 1. The model and its tokenizer, whose chat template says how a conversation is written
        tokenizer = load_tokenizer(args.model)
        said = choose_template(tokenizer, args.chat_template)
        check_template(tokenizer)
        set_seed(args.seed)
        # Training needs float32 weights, whatever precision the checkpoint was exported in.
        model = open_causal_lm(args.model, dtype=torch.float32)
        block_size = choose_block_size(args, model, tokenizer)
        pad_token_id = padding_token_id(tokenizer)

        # 2. Conversations to token ids, and the mask of what is learned
        (training, validation, test), description = load_data(args)
        sides = {"train": training, "eval": validation, "test": test}
        rows = {}
        for name, side in sides.items():
            on_prompt = args.train_on_prompt and name == "train"  # what is measured is always the responses
            encoded = encode_conversations(side, tokenizer, max_length=block_size, train_on_prompt=on_prompt)
            rows[name] = ConversationRows(
                encoded, block_size=block_size, pad_token_id=pad_token_id, packing=args.packing
            )
        if args.packing:
            check_packing(model, rows["train"])
        # The model stops at the end of its turn as well as at the end of a document, in everybody's `generate`.
        stop_at_turns(model, tokenizer, stop_token_id=rows["train"].encoded.stop_token_id)

        # 3. What is trained: small matrices beside the frozen weights, or everything
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
        if is_main:
            save_arguments(args, output_dir / "arguments.yaml")
            save_environment(output_dir, num_processes=trainer.args.world_size)
            if said:
                print(said)
            describe(args, description, sides, rows, tokenizer, model)

        # 4. What the model says before
        questions = [test[row.index] for row in rows["test"].encoded.rows]
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

        # 5. Training: transformers' Trainer, which divides the summed loss by the count of learned tokens, whatever
        # the accumulation and the number of processes
        started = time.perf_counter()
        [last] = broadcast_object_list([newest_checkpoint(output_dir) if is_main else None])
        trainer.train(resume_from_checkpoint=last)
        metrics["train_seconds"] = round(time.perf_counter() - started, 1)

        # 6. What it says after
        metrics["eval_loss"] = response_loss(trainer, rows["eval"])
        metrics["test_loss"] = response_loss(trainer, rows["test"])
        if args.check_answers if args.check_answers is not None else args.dataset == "stdlib":
            checked = questions[: args.max_answers]
            metrics |= {"test_questions": len(questions), **exact_match(checked, replies_to(checked))}
            # The same questions as people may put them: in other words, or in a chat, each after another question and
            # its right answer.
            others = {}
            if args.reword_questions:
                reworded = reword_questions(checked, seed=args.seed)
                others["reworded"] = [row for row, asked in zip(reworded, checked) if row.messages != asked.messages]
            if args.max_turns > 1 and args.dataset == "stdlib":
                others["second_turn"] = list(map(follow_up, [checked[-1], *checked], checked))
            for name, asked in others.items():
                if asked:  # of few questions perhaps none has other words
                    metrics[f"test_exact_match_{name}"] = exact_match(asked, replies_to(asked))["test_exact_match"]
        after = replies_to(samples)

        # 7. The model as everybody's tools open it: LoRA merged into the weights, and beside it the adapter alone
        metrics |= describe_run(args, trainer, rows["train"])
        save_model(args, trainer, tokenizer, output_dir)
        if is_main:
            write_samples(output_dir / "samples.txt", samples, before, after)
            (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            write_page_and_card(output_dir)
            report(args, metrics, output_dir, pick_example(samples, after))
        trainer.accelerator.end_training()


def choose_block_size(args: InstructionArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    context = getattr(model.config, "max_position_embeddings", 1024)
    check_fit(model.config, num_ids=len(tokenizer), block_size=args.block_size)
    if args.block_size == 1:
        raise ValueError(f"--block_size 1: choose 2 to {context:,}, the model's context.")
    return args.block_size or min(context, 1024)


def load_data(
    args: InstructionArguments,
) -> tuple[tuple[list[Conversation], list[Conversation], list[Conversation]], str]:
    column_map = {}
    for each in args.column_map or []:
        name, equals, meaning = each.partition("=")
        if not (name and equals and meaning):
            raise ValueError(f"--column_map {each}: give name=meaning, e.g. question=prompt answer=response")
        column_map[name] = meaning
    conversations = load_conversations(
        args.dataset,
        dataset_config=args.dataset_config,
        split=args.split,
        column_map=column_map,
        on_bad_record=args.on_bad_record,
        seed=args.seed,
    )
    sides = split_conversations(
        conversations.rows,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
        seed=args.seed,
    )
    description = conversations.description
    if args.num_further_questions:
        known = [conversation for side in sides for conversation in side]
        further = further_questions(args.num_further_questions, seed=args.seed, held_back=known)
        sides = (sides[0] + further, *sides[1:])
        description += f"; {len(further):,} further expressions to train on"
    if args.reword_questions:
        sides = (reword_questions(sides[0], seed=args.seed), *sides[1:])
        description += "; expressions to train on are put in several wordings"
    if args.max_turns > 1:
        sides = (join_turns(sides[0], max_turns=args.max_turns, seed=args.seed), *sides[1:])
    return sides, description


def make_trainer(
    args: InstructionArguments, model: torch.nn.Module, rows: dict[str, ConversationRows]
) -> InstructionTrainer:
    arguments = TrainingArguments(
        output_dir=str(Path(args.output_dir) / "checkpoints"),
        max_steps=args.max_steps or -1,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=learning_rate_of(args),
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        train_sampling_strategy="random" if args.packing else "group_by_length",
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        report_to=trackers(args.report_to),
        bf16=args.bf16,
        seed=args.seed,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = InstructionTrainer(
        model,
        arguments,
        optimizers=(muon(args, model) if args.optimizer == "muon" else None, None),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        data_collator=rows["train"].collate,
        compute_loss_func=learned_loss,
    )
    trainer.remove_callback(PrinterCallback)  # log.jsonl has it all
    describe_evaluation = "validation {eval_loss:.4f} nats per response token".format_map
    trainer.add_callback(LogFile(Path(args.output_dir) / "log.jsonl", describe_evaluation))
    return trainer


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
    )


def response_loss(trainer: InstructionTrainer, rows: ConversationRows) -> float:
    """Nats per token of the responses: a sum over the learned tokens of all rows divided by their count."""
    batch_size = trainer.args.per_device_eval_batch_size
    loss, _ = score_rows(
        trainer.model, rows, np.arange(len(rows)), batch_size=batch_size, accelerator=trainer.accelerator
    )
    return loss


def pick_samples(questions: list[Conversation], number: int) -> list[Conversation]:
    """Some test questions, of each kind as many as there are kinds to share them."""
    seen: Counter[str | None] = Counter()
    order = []
    for position, question in enumerate(questions):
        seen[question.kind] += 1
        order.append((seen[question.kind], position))
    return [questions[position] for _, position in sorted(order)[:number]]


def follow_up(before: Conversation, question: Conversation) -> Conversation:
    return dataclasses.replace(question, messages=[*before.messages, *question.messages])


def describe(
    args: InstructionArguments,
    description: str,
    sides: dict[str, list[Conversation]],
    rows: dict[str, ConversationRows],
    tokenizer: PreTrainedTokenizerBase,
    model: torch.nn.Module,
) -> None:
    training, encoded = rows["train"], rows["train"].encoded
    how = "a row each, rows of about equal lengths together"
    if args.packing:
        how = f"packed into {len(training):,} rows of up to {training.block_size}, {training.packing_waste:.1%} empty"
    print(
        f"{description}\n"
        f"Split by prompts: {len(sides['train']):,} to train on, {len(sides['eval']):,} to validate, "
        f"{len(sides['test']):,} to test.\n"
        f"Training: {encoded.summary()}; {how}.\n"
        "The first conversation, with what is learned between >> and <<:\n\n"
        f"{mark_learned(encoded.rows[0], tokenizer)}\n{describe_trained(model)}",
        flush=True,
    )


def describe_run(args: InstructionArguments, trainer: InstructionTrainer, rows: ConversationRows) -> dict[str, Any]:
    runtime = next((entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry), None)
    trained, total = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    return {
        **{f"train_{name}": number for name, number in rows.encoded.account.items()},
        "train_rows": len(rows),
        "train_padding_share": rows.seen_padding_share,
        "train_steps": trainer.state.global_step,
        "tokens_per_second": round(rows.tokens_seen * trainer.args.world_size / runtime, 1) if runtime else None,
        "num_parameters": total,
        "num_trained_parameters": trained,
        "method": args.method,
        "dataset": args.dataset,
        "seed": args.seed,
    }


def save_model(
    args: InstructionArguments, trainer: InstructionTrainer, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.method == "lora" and trainer.is_world_process_zero():
        save_adapter(model, output_dir / "adapter")
        if args.chat_template is not None:  # the base's tokenizer does not have it
            tokenizer.save_pretrained(output_dir / "adapter")
        merged = merge_adapter(model)
        merged.config.use_cache = True  # Trainer switched it off
        merged.save_pretrained(output_dir)
    elif args.method == "full":
        model.config.use_cache = True
        trainer.save_model(str(output_dir))
        (output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; arguments.yaml says the same
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(output_dir)


def write_samples(path: Path, samples: list[Conversation], before: list[Reply], after: list[Reply]) -> None:
    parts = []
    for question, old, new in zip(samples, before, after):
        last = last_response(question)
        parts.append(
            f"--- {question.messages[last - 1]['content']}\n"
            f"expected: {question.messages[last]['content']}\nbefore:   {old.text!r:.200}\nafter:    {new.text}\n"
        )
    path.write_text("\n".join(parts), encoding="utf-8")
    print("\n" + "\n".join(parts))


def pick_example(samples: list[Conversation], replies: list[Reply]) -> str | None:
    """The first line of a question that was answered as it should be, or else of any."""
    right, wrong = [], []
    for question, reply in zip(samples, replies):
        last = last_response(question)
        is_right = reply.text == question.messages[last]["content"].strip()
        (right if is_right else wrong).append(question.messages[last - 1]["content"].split("\n")[0][:200])
    return next(iter(right + wrong), None)


def report(args: InstructionArguments, metrics: dict[str, Any], output_dir: Path, example: str | None) -> None:
    exact = ""
    if "test_exact_match" in metrics:
        kinds = ", ".join(
            f"{name.removeprefix('test_exact_match_')} {value:.1%}"
            for name, value in metrics.items()
            if name.startswith("test_exact_match_")
        )
        kinds = kinds.replace("reworded", "expressions in other words")
        kinds = kinds.replace("second_turn", "all kinds as the second turn of a chat")
        exact = (
            f"Exact match on {metrics['test_answers']:,} of {metrics['test_questions']:,} test questions, none of "
            f"which was in training: {metrics['test_exact_match']:.1%}{f' ({kinds})' if kinds else ''}. "
            f"{metrics['test_answers_unfinished']:,} replies had no end after --max_new_tokens {args.max_new_tokens}, "
            f"{metrics['test_answers_empty']:,} were empty.\n"
        )
    adapter = f"{output_dir}/adapter             LoRA's matrices alone\n" if args.method == "lora" else ""
    print(
        f"Loss in nats per response token (prompts do not count): validation {metrics['eval_loss_before']:.4f} before, "
        f"{metrics['eval_loss']:.4f} after; test {metrics['test_loss_before']:.4f} and {metrics['test_loss']:.4f}.\n"
        f"{exact}"
        f"{metrics['train_steps']:,} steps in {metrics['train_seconds'] / 60:.1f} minutes with evaluations, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['train_padding_share']:.1%} of the places padding.\n\n"
        f"{output_dir}/model.safetensors   the model, with its tokenizer and code beside it\n{adapter}"
        f"{output_dir}/samples.txt         replies before and after; metrics.json has the numbers\n"
        f"{output_dir}/report.html         the run's page, to open in a browser\n\n"
        f"Next, talk to it:\n    python recipes/chat.py --model {shlex.quote(str(output_dir))}"
    )
    if example:
        print(f"It knows the kind of question that it was taught, for example:\n    {example}")


if __name__ == "__main__":
    run(main, InstructionArguments, description=__doc__)
