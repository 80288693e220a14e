"""Chapter 4: let a model write, token by token.

    python recipes/generate.py --model out/demo --prompt "import os"
    python recipes/generate.py --model out/demo --prompt "def main(" --num_samples 3 --temperature 1.0 --top_k 0
    python recipes/generate.py --model out/demo --do_sample false --max_new_tokens 200

`--model` is a folder that a recipe of ours wrote, or any causal language model of the Hub.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TextStreamer, set_seed
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

import hfllm  # noqa: F401  (registers the model with the Auto classes)
from hfllm.arguments import run
from hfllm.tokenization import load_tokenizer


@dataclass
class GenerateArguments:
    model: str = HfArg(default="out/demo", help="Folder or Hub id of the model.")
    prompt: str = HfArg(default="", help="What the text begins with; default: the start of a document.")
    max_new_tokens: int = HfArg(default=128, help="Most tokens to write.")
    num_samples: int = HfArg(default=1, help="How many texts.")
    do_sample: bool = HfArg(default=True, help="Draw each token from its probabilities; false takes the likeliest.")
    temperature: float = HfArg(default=0.8, help="Below 1 favours likely tokens, above 1 unlikely ones.")
    top_k: int = HfArg(default=50, help="Draw from so many of the likeliest tokens; 0: from all.")
    top_p: float = HfArg(default=1.0, help="Draw from the likeliest tokens that together have this probability.")
    repetition_penalty: float = HfArg(default=1.0, help="Above 1 makes tokens that occurred less likely.")
    seed: int = HfArg(default=42, help="Of the draws; sample n of a call has seed + n.")
    config: str | None = HfArg(default=None, help="A YAML file of these options.")


def main(args: GenerateArguments) -> None:
    # 1. The model and its tokenizer
    model = load_model(args.model)
    tokenizer = load_tokenizer(args.model)

    # 2. Text to token ids: the tokenizer puts its start token first, as each document in training had it.
    input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    if input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
    context = model.config.max_position_embeddings
    if input_ids.shape[1] + args.max_new_tokens > context:
        room = context - input_ids.shape[1]
        if room < 1:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]:,} tokens, and the model's context is {context:,}. Shorten it."
            )
        print(f"(the context of {context:,} tokens leaves room for {room:,} new ones)")
        args.max_new_tokens = room

    # 3. Token after token; each is printed as soon as it is certain how it reads
    choice = {"do_sample": False}
    if args.do_sample:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    for index in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {index + 1}, seed {args.seed + index}")
        set_seed(args.seed + index)
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.max_new_tokens,
            repetition_penalty=args.repetition_penalty,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **choice,
        )


def load_model(model: str) -> PreTrainedModel:
    """The model, on the best device there is; what is no model says so."""
    disable_progress_bar()
    if Path(model).is_dir() and not (Path(model) / "config.json").exists():
        found = sorted(path.name for path in Path(model).iterdir())[:10]
        raise ValueError(
            f"--model {model} is a folder without a config.json, so there is no model in it yet; it holds {found}. "
            "A pretraining run writes its model when it ends: start it again with the same command, and it goes on."
        )
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model!r} is neither a folder nor a model that the Hub gave us: {str(error).splitlines()[0]} "
            "Train one with recipes/pretrain.py, or give the path of its output_dir."
        ) from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, config=config).to(device).eval()


if __name__ == "__main__":
    run(main, GenerateArguments, description=__doc__)
