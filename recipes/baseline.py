"""The baseline of `benchmark.py --measure time_to_quality`: transformers' Trainer and GPT-2, on characters.

    python recipes/baseline.py --dataset literature.txt --output_dir out/baseline

The configuration is the one that nanoGPT's README gives for a CPU: 4 layers of 128, 4 heads, context 64, 12 rows, 2,000
steps of AdamW with beta2 0.99, the learning rate rising to 1e-3 over 100 steps and falling to 1e-4 by a cosine, no
dropout. The same text is held out as in recipes/pretrain.py.
"""

import math

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.options import arguments, check_numbers, differs
from hfllm.data import load_corpus, split_documents
from hfllm.runs.files import open_output_dir, write_json

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


@arguments
class BaselineArguments(groups.Dataset, groups.ValidationFraction, groups.MaxSteps, groups.OutputDir, groups.Config):
    dataset = differs(help="The text, preferably a single file.")
    validation_fraction = differs(help="Share held out: the end of a single document.")
    max_steps = differs(2000, help="Optimizer steps, each of 12 rows of 64 characters.")
    output_dir = differs("out/baseline", help="Folder of metrics.json.")


BLOCK_SIZE, ROWS = 64, 12


class RandomWindows(torch.utils.data.Dataset):
    """The rows of training, each from a random place of the text."""

    def __init__(self, ids: torch.Tensor, num_rows: int):
        self.ids = ids
        self.starts = torch.randint(len(ids) - BLOCK_SIZE, (num_rows,), generator=torch.Generator().manual_seed(1337))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.ids[self.starts[index] :][: BLOCK_SIZE + 1]
        return {"input_ids": window[:-1], "labels": window[:-1], "shift_labels": window[1:]}


def main(args: BaselineArguments) -> None:
    check_numbers(args)
    # 1. The tokens are characters.
    parts = split_documents(load_corpus(args.dataset), validation_fraction=args.validation_fraction)
    train_text, held_out = ("".join(documents["text"]) for documents in parts)
    characters = {character: number for number, character in enumerate(sorted(set(train_text + held_out)))}
    train_ids, held_out_ids = (torch.tensor([characters[each] for each in text]) for text in (train_text, held_out))

    if min(len(train_ids), len(held_out_ids)) <= BLOCK_SIZE:
        raise ValueError(
            f"{len(train_ids):,} characters to train on and {len(held_out_ids):,} held back: both must be longer "
            f"than a row of {BLOCK_SIZE}. Give more text, or another --validation_fraction."
        )

    output_dir = open_output_dir(args.output_dir)

    # 2. GPT-2, and Trainer's own loop
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": BLOCK_SIZE}
    ids = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(characters), **shape, **no_dropout, **ids))
    settings = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_steps=min(100, args.max_steps // 2),
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        logging_steps=500,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=RandomWindows(train_ids, args.max_steps * ROWS)).train()

    # 3. Every held-out character but the first is predicted once, in windows that do not overlap.
    num_rows = (len(held_out_ids) - 1) // BLOCK_SIZE
    rows, targets = (held_out_ids[start:][: num_rows * BLOCK_SIZE].view(num_rows, -1) for start in (0, 1))
    nats = 0.0
    with torch.no_grad():
        for inputs, labels in zip(rows.split(64), targets.split(64), strict=True):
            logits = model.eval()(inputs.to(model.device), use_cache=False).logits.cpu()
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
    loss = nats / targets.numel()
    bits_per_byte = loss * len(held_out) / len(held_out.encode()) / math.log(2)
    metrics = {"eval_loss": loss, "eval_bits_per_byte": bits_per_byte, "train_steps": args.max_steps}
    write_json(output_dir / "metrics.json", metrics)
    print(f"Validation: {loss:.4f} nats per character, {bits_per_byte:.4f} bits per byte.")


if __name__ == "__main__":
    run(main, BaselineArguments, description=__doc__)
