"""Verification of a GGUF file against its model and tokenizer, by transformers and by llama.cpp."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .comparison import LogitComparison, compare_logits, random_prompts
from .gguf import Q8_BLOCK, gguf_tensors, import_gguf
from .llama_cpp import find_llama_cpp, how_to_get
from .llama_cpp_comparison import CONVERSATION, LlamaCppComparison, compare_with_llama_cpp, texts_for


PROMPTS = ("The", "def ", "Once upon a time", "import os\n", "1, 2, 3,", "\u4e2d\u6587")


@dataclass(frozen=True)
class GGUFReport:
    """The result for a file that passed.

    `logits` compares the model with the file read back by transformers: the effect of rounding the weights.
    `llama_cpp` is None if llama.cpp is not installed.
    """

    path: Path
    dtype: str
    num_bytes: int
    logits: LogitComparison
    llama_cpp: LlamaCppComparison | None

    def __str__(self) -> str:
        lines = [
            f"{self.path.name}: {self.dtype}, {self.num_bytes / 2**20:,.1f} MiB",
            "every tensor read back by transformers is the model's, to the rounding of its type",
            f"logits with the weights read back: {self.logits}",
            str(self.llama_cpp or f"llama.cpp itself is not installed, so it did not test the file. {how_to_get()}"),
        ]
        return "\n".join(lines)


def verify_gguf(
    path: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    node_modules: str | os.PathLike | None = None,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 32,
    timeout: float = 600,
) -> GGUFReport:
    """Compare a GGUF file with the native model and the tokenizer that it was exported from.

    Always: transformers reads the file back, and shape, tensors, logits and token ids are compared. If llama.cpp is
    installed (see `find_llama_cpp`, which takes `node_modules`): its token ids, its rendering of the chat template, and
    its greedy tokens and logits after the prompts and after random ids. `timeout` for llama.cpp is in seconds.

    Raises:
        RuntimeError: if anything differs by more than rounding explains; says what, and by how much.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} compares nothing; give at least 1.")
    path = Path(path)
    llama_cpp = find_llama_cpp(node_modules)
    reader = import_gguf().GGUFReader(path)  # takes seconds for a large vocabulary, as in each loader of transformers
    dtype = _dtype_of(reader)
    model = _on_the_cpu_in_float32(model)
    read_back = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=model.config, dtype=torch.float32
    ).eval()
    _check_config(path, model)
    _check_tensors(reader, model, read_back, dtype)
    _check_tokenizer(path, tokenizer)

    num_positions = model.config.max_position_embeddings
    runs = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    runs += [ids[0].tolist() for ids in random_prompts(len(tokenizer), [1, 48, 256], num_rows=1)]
    num_new = min(max_new_tokens, (num_positions + 1) // 2)
    runs = [prompt[: num_positions + 1 - num_new] for prompt in runs if prompt]  # the last new token is not read
    logits = compare_logits(model, read_back, [torch.tensor([prompt]) for prompt in runs])
    if not logits.largest_difference <= (1e-4 * logits.largest_logit if dtype == "f32" else math.inf):
        raise RuntimeError(f"{path.name} read back by transformers is not the model: {logits}.")
    comparison = None
    if llama_cpp is not None:
        comparison = compare_with_llama_cpp(
            llama_cpp, path, read_back, tokenizer, runs, num_new, dtype=dtype, timeout=timeout
        )
    return GGUFReport(path, dtype, path.stat().st_size, logits, comparison)


def _dtype_of(reader: Any) -> str:
    file_type = import_gguf().LlamaFileType(reader.get_field("general.file_type").contents())
    return file_type.name.removeprefix("ALL_").removeprefix("MOSTLY_").lower()


def _on_the_cpu_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it is in float32 on the CPU already, else another one with its weights.

    Not a copy: `model.to(torch.bfloat16)` has also rounded the frequencies of rotary positions, which no file holds and
    every reader computes again.
    """
    if all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()):
        return model
    state = {name: tensor.to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    return type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=torch.float32).eval()


def _check_config(path: Path, model: PreTrainedModel) -> None:
    """The shape as transformers reads it from the file alone, for the fields that it reads."""
    expected, found = model.config, AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    fields = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings"]
    if expected.model_type == "gpt2":
        fields += ["layer_norm_epsilon"]
    else:
        fields += ["intermediate_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
    values = {field: (getattr(expected, field), getattr(found, field)) for field in fields}
    if expected.model_type != "gpt2":
        values["rope_theta"] = (expected.rope_parameters["rope_theta"], found.rope_parameters["rope_theta"])
    for field, (ours, theirs) in values.items():
        if not math.isclose(ours, theirs, rel_tol=1e-6):  # the file holds float32
            raise RuntimeError(f"{path.name} says {field}={theirs}, the model {ours}.")


def _check_tensors(reader: Any, model: PreTrainedModel, read_back: PreTrainedModel, dtype: str) -> None:
    """Check each tensor up to the rounding of its type; transformers converts the layout back with its own code."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    found = dict(gguf_tensors(read_back))
    for name, tensor in gguf_tensors(model):
        if name not in stored:
            raise RuntimeError(f"The file lacks the tensor {name}.")
        if name == "rope_freqs.weight":  # transformers computes these from its config
            found[name] = torch.tensor(stored[name].data)
        storage = stored.pop(name).tensor_type.name.lower()
        if storage not in ("f32", dtype) and (dtype, storage) != ("q8_0", "f16"):
            raise RuntimeError(f"{name} is stored as {storage} in a file of {dtype}.")
        excess = ((tensor - found[name]).abs() - _largest_rounding(tensor, storage)).max().item()
        if not excess <= 0:
            raise RuntimeError(
                f"{name} read back by transformers differs from the model's by more than {storage} rounds "
                f"(by {excess:.1e} more)."
            )
    if stored:
        raise RuntimeError(f"The file holds tensors that the model lacks: {sorted(stored)}.")


def _largest_rounding(tensor: torch.Tensor, storage: str) -> torch.Tensor:
    """The largest change of each value by rounding: half a unit in the last place, or half a step of q8_0."""
    if storage == "f32":
        return torch.zeros(())
    if storage == "f16":
        return tensor.abs() * 2**-11 + 2**-25
    if storage == "bf16":
        return tensor.abs() * 2**-8 + 1e-38
    # A block's step is its largest value / 127, rounded to float16 itself, and up to 127 steps make a value.
    largest = tensor.unflatten(-1, (-1, Q8_BLOCK)).abs().amax(-1, keepdim=True).expand(-1, -1, Q8_BLOCK).flatten(1)
    return largest * (0.5 / 127 + 2**-11) * 1.01 + 127 * 2**-25


def _check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the ids of the tokenizer that transformers builds from the file alone."""
    found = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    # llama.cpp's "llama-bpe" does not merge inside a word that is a token; transformers' reader does not know that.
    found.backend_tokenizer.model.ignore_merges = tokenizer.backend_tokenizer.model.ignore_merges
    normalizes = getattr(tokenizer.backend_tokenizer, "normalizer", None) is not None
    for text in [*texts_for(tokenizer), "".join(tokenizer.all_special_tokens)]:
        if normalizes:
            text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        for add_special_tokens in (True, False):
            ours = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            theirs = found(text, add_special_tokens=add_special_tokens)["input_ids"]
            if ours != theirs:
                raise RuntimeError(f"{path.name} read back by transformers encodes {text!r} as {theirs}, not {ours}.")
    if tokenizer.chat_template is not None:
        ours, theirs = (
            side.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
            for side in (tokenizer, found)
        )
        if ours != theirs:
            raise RuntimeError(f"The chat template in {path.name} renders {theirs!r}, the tokenizer's {ours!r}.")
