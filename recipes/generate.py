"""Chapter 4: generate text, token by token.

    python recipes/generate.py --model out/demo --prompt "import os"
    python recipes/generate.py --model out/demo --prompt "def main(" --num_samples 3 --temperature 1.0 --top_k 0
    python recipes/generate.py --model out/demo --do_sample false --max_new_tokens 2000
    python recipes/generate.py --model out/demo --prompt "def read(self" "class Queue" --stop "def " "class "
    python recipes/generate.py --model out/demo --prompt_file prompts.txt

`--model` is a folder that a recipe wrote, or any causal language model of the Hub. One prompt is streamed, and Ctrl-C
ends it; several are continued side by side, and printed when all are done.
"""

import logging
import sys

import hfllm
from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm
from hfllm.cli.options import Location, arguments, check_numbers, differs, option
from hfllm.data.prompts import load_prompts
from hfllm.serving.text import FollowTexts, TextStream
from hfllm.tokenization import load_tokenizer

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, set_seed
from transformers.utils.logging import disable_progress_bar


@arguments
class GenerateArguments(
    groups.Model,
    groups.Dtype,
    groups.Prompt,
    groups.NewTokens,
    groups.NumSamples,
    groups.Sampling,
    groups.TopK,
    groups.Seed,
    groups.Config,
):
    prompt_file: str | None = option(
        None,
        section="generation",
        help="File of prompts: one per line, or .jsonl with a 'prompt' each, which may have newlines.",
        location=Location.READ,
    )
    max_new_tokens = differs(128, help="Most tokens to write.")
    stop: list[str] | None = option(
        None,
        section="generation",
        help="End a text at the first of these strings; in a shell, a newline is $'\\n'.",
    )
    do_sample: bool = option(
        True, section="generation", help="Draw each token from its probabilities; false takes the likeliest."
    )
    repetition_penalty: float = option(
        1.0, section="generation", help="Above 1: tokens that occurred are less likely.", above=0
    )
    seed = differs(section="generation", help="Sampling seed; sample n of a call has seed + n.")

    def check(self) -> None:
        """Reject out-of-range values and options that exclude each other, all at once."""
        check_numbers(self)
        defaults = GenerateArguments()
        drawing = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) != getattr(defaults, name)]
        greedy = not self.do_sample
        last_seed = self.seed + self.num_samples - 1
        problems = [
            (
                self.temperature < 1e-4,
                f"--temperature {self.temperature}: it must be at least 0.0001; --do_sample false is greedy.",
            ),
            (last_seed >= 2**32, f"--seed {self.seed}: the last sample's seed would be above 4,294,967,295."),
            (greedy and drawing, f"--do_sample false draws nothing: leave out --{', --'.join(drawing)}."),
            (
                greedy and self.num_samples > 1,
                f"--do_sample false writes one text, not --num_samples {self.num_samples}.",
            ),
            (self.prompt and self.prompt_file, "--prompt and --prompt_file: give one of the two."),
            ("" in (self.prompt or []), "--prompt '' is empty: leave it out to begin a document."),
            ("" in (self.stop or []), "--stop '' would stop everywhere: give the text that ends it."),
        ]
        if wrong := [problem for is_wrong, problem in problems if is_wrong]:
            raise ValueError(" ".join(wrong))


def main(args: GenerateArguments) -> None:
    args.check()
    prompts = read_prompts(args)

    # 1. The model and its tokenizer
    disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = open_causal_lm(args.model, **({"dtype": args.dtype} if args.dtype else {})).to(device).eval()
    tokenizer = load_tokenizer(args.model)

    # 2. Text to token ids. The tokenizer adds its start token, as at the beginning of each document in training.
    #    Prompts of different lengths are padded on the left, so that each row ends where its next token comes.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token works: the attention mask says where the text is
    inputs = tokenizer(prompts or [tokenizer.bos_token], add_special_tokens=bool(prompts), padding=True)
    input_ids = torch.tensor(inputs.input_ids, device=model.device)  # (B, T)
    attention_mask = torch.tensor(inputs.attention_mask, device=model.device)
    if input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives the prompt the id {input_ids.max()}, but the model's vocabulary has only "
            f"{model.config.vocab_size:,} ids: the tokenizer belongs to another model."
        )
    if note := explain_length(model, int(attention_mask.sum(-1).max()), args.max_new_tokens):
        print(note)
    # The libraries would repeat this note in the middle of the text.
    for name in ("hfllm.model", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # 3. Token after token. A single text is printed as it is written, each piece once its characters are complete.
    choice = {"do_sample": False}
    if args.do_sample:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    is_streamed = len(input_ids) == 1
    try:
        for index in range(args.num_samples):
            sample = f"sample {index + 1}, seed {args.seed + index}" if args.num_samples > 1 else ""
            if is_streamed and sample:
                print(f"--- {sample}")
            if is_streamed:
                print_piece("".join(prompts))
            texts = [
                TextStream(tokenizer, prompt_ids=row, stop=args.stop or [], keep_stop=True) for row in inputs.input_ids
            ]
            follow = FollowTexts(texts, on_text=print_piece if is_streamed else None)
            set_seed(args.seed + index)
            try:
                model.generate(
                    input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=args.max_new_tokens,
                    repetition_penalty=args.repetition_penalty,
                    pad_token_id=tokenizer.pad_token_id,
                    stopping_criteria=StoppingCriteriaList([follow]),
                    **choice,
                )
            finally:  # also when Ctrl-C has ended it
                follow.end()
                if is_streamed:
                    print()
            if not is_streamed:
                for number, (prompt, text) in enumerate(zip(prompts, texts), start=1):
                    print(f"--- prompt {number}{', ' if sample else ''}{sample}\n{prompt}{text.text}")
    except KeyboardInterrupt:
        print("(stopped)")
        sys.exit(130)


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


def read_prompts(args: GenerateArguments) -> list[str]:
    """The prompts of --prompt or --prompt_file; an empty list means the start of a document."""
    if args.prompt_file is None:
        return args.prompt or []
    return load_prompts(args.prompt_file)


def explain_length(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> str | None:
    """A note about text past the model's context, if it may get that long; an error if the model cannot do it."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None or prompt_length + max_new_tokens <= context:
        return None
    if getattr(model.config, "position_embedding_type", None) == "learned" and isinstance(model, hfllm.GPTForCausalLM):
        return (
            f"(Past the context of {context:,} tokens, each token is predicted from the last {context:,} alone, and "
            "takes as long as a pass over all of them.)"
        )
    if getattr(model.config, "rope_parameters", None):
        return (
            f"(Past the context of {context:,} tokens the model continues at positions that it did not see in "
            "training: the text may get worse.)"
        )
    room = f" --max_new_tokens {context - prompt_length}" if prompt_length < context else " a shorter prompt"
    raise ValueError(
        f"A {model.config.model_type} cannot write past its context, here {context:,} tokens, of which the prompt "
        f"takes {prompt_length:,}. Give{room}, or convert it into an hfllm model, whose context slides: "
        "python recipes/export.py --to hfllm (gpt2, llama and qwen3)."
    )


if __name__ == "__main__":
    run(main, GenerateArguments, description=__doc__)
