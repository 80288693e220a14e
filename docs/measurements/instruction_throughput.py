"""Speed of instruction tuning beside a plain Trainer on the same conversations, in turns in one process.

    OMP_NUM_THREADS=1 python docs/measurements/instruction_throughput.py --model out/demo

Run it from the repository's root; `measure.py instruction_throughput` does, and keeps the numbers. Both are
transformers' Trainer with the same model, AdamW and conversations. The recipe's is as the recipe makes it, with packed
rows and logits only where something is learned. The plain one has one conversation per row in random order, padded to
the longest of its batch, and as many conversations per batch as the recipe has on average. Padding is not counted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from hfllm.cli.arguments import parse_arguments
from hfllm.data.conversations import load_conversations
from hfllm.data.instruction import ConversationRows, encode_conversations, padding_token_id
from hfllm.tokenization import load_tokenizer
from hfllm.training.devices import keep_freed_memory


ROOT = Path(__file__).parents[2]
ROWS = 4  # packed rows per batch, as recipes/configs/instruction_python.yaml has it
WARM_UP = 2  # first steps of a round, which are not counted


class Stopwatch(TrainerCallback):
    """The seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="steps of each Trainer per round")
    parser.add_argument("--output_file", type=Path, help="also write the numbers there, as JSON")
    options = parser.parse_args()
    keep_freed_memory()
    sys.path.insert(0, str(ROOT / "recipes"))
    import finetune_instruction as recipe  # a recipe is a script, and in no package

    tokenizer = load_tokenizer(options.model)
    tokenizer.pad_token_id = padding_token_id(tokenizer)
    conversations = load_conversations("stdlib").rows[:4000]
    encoded = encode_conversations(conversations, tokenizer, max_length=256)
    packed = ConversationRows(encoded, block_size=256, pad_token_id=tokenizer.pad_token_id)
    few = encode_conversations(conversations[:4], tokenizer, max_length=256)  # Trainer evaluates at its end
    evaluated = ConversationRows(few, block_size=256, pad_token_id=tokenizer.pad_token_id)
    plain = [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": [i if n else -100 for i, n in zip(row.input_ids, row.is_learned)],
        }
        for row in encoded.rows
    ]
    per_batch = round(ROWS * len(plain) / len(packed))
    models = [AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2)]
    speeds: dict[str, list[float]] = {"the recipe": [], "plain Trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        args = parse_arguments(
            recipe.InstructionArguments,
            [
                *(f"--output_dir={folder}", "--method=full", f"--max_steps={options.steps}"),
                *(f"--per_device_train_batch_size={ROWS}", "--logging_steps=1000", "--save_steps=1000"),
                *("--eval_steps=1000", "--load_best_model_at_end=false"),
            ],
        )
        for number in range(options.rounds):
            args.seed = number
            ours = recipe.make_trainer(args, models[0], {"train": packed, "eval": evaluated})
            speeds["the recipe"].append(measure(ours))
            theirs = Trainer(
                models[1],
                TrainingArguments(
                    output_dir=str(Path(folder) / "plain"),
                    max_steps=options.steps,
                    per_device_train_batch_size=per_batch,
                    save_strategy="no",
                    report_to="none",
                    seed=number,
                    use_cpu=not torch.accelerator.is_available(),
                    dataloader_pin_memory=torch.accelerator.is_available(),
                    disable_tqdm=True,
                ),
                train_dataset=plain,
                data_collator=DataCollatorForSeq2Seq(tokenizer),
            )
            speeds["plain Trainer"].append(measure(theirs))
    print(
        f"{ROWS} packed rows of 256 against {per_batch} padded conversations a batch, {torch.get_num_threads()} threads"
    )
    for name, each in speeds.items():
        print(f"{name:14} {statistics.median(each):8,.0f} tokens of text/s ({min(each):,.0f} to {max(each):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
    print(f"the recipe is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.output_file is not None:
        results = {
            "tokens_per_second": {name: describe(each) for name, each in speeds.items()},
            "ratio": describe(ratios),
            "conversations_per_batch": per_batch,
        }
        options.output_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def describe(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(trainer: Trainer) -> float:
    """Tokens of text per second over the steps after the warm-up."""
    counts: list[int] = []
    collate = trainer.data_collator

    def counting(rows):
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = counting
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.train()
    return sum(counts[WARM_UP : len(stopwatch.seconds)]) / sum(stopwatch.seconds[WARM_UP:])


if __name__ == "__main__":
    main()
