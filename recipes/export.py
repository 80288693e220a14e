"""Chapter 5, loading pretrained weights, and the way back: convert a model to the format of other programs.

A model that you trained, for programs with transformers' own classes (pipelines without hfllm, vLLM) and for llama.cpp:

    python recipes/export.py --model out/demo --to qwen3 --output_dir out/demo-qwen3
    python recipes/export.py --model out/demo --to gguf --dtype q8_0 --output_dir out/demo-gguf
    python recipes/export.py --model out/demo --to onnx --output_dir out/demo-onnx

GPT-2, a Llama 3 or a Qwen3 as an hfllm model, to inspect or to train further:

    python recipes/export.py --model openai-community/gpt2 --to hfllm --output_dir out/gpt2

One model's folder of a checkpoint that several processes wrote in pieces (FSDP2, HSDP), also while the run continues:

    python recipes/export.py --model out/run/checkpoints/step-00001000 --to whole --output_dir out/step-1000

The preset `modern` is a qwen3, and `book` a gpt2. Every export is read back from the disk and compared with the
original before the recipe reports success: logits, greedy tokens, and the ids of text that is hard for tokenizers.
"""

import shlex
import textwrap
from pathlib import Path
from typing import Literal

from hfllm import GPTForCausalLM, from_native, to_native
from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import base_of_adapter
from hfllm.cli.options import arguments, differs, inputs_of, option
from hfllm.conversion import comparison
from hfllm.conversion.folder import save_model, save_tokenizer
from hfllm.conversion.loading import NATIVE_TYPES, load_causal_lm
from hfllm.runs.folder import RunFolder, claim_folder
from hfllm.runs.identity import hash_model
from hfllm.runs.sharded import is_sharded, iterate_tensors
from hfllm.tokenization import tokenizer_fingerprint
from hfllm.training.checkpoint import consolidate_checkpoint, find_checkpoint_fault

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


# The largest difference between logits that may be due to the order of additions, in float32 and in proportion to the
# largest logit (at least 1). A weight in another place, or transposed, makes a difference of about 1.
TOLERANCE = 1e-5
NUM_GREEDY_TOKENS = 16
PROMPT = "Every effort moves you"

GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}


@arguments
class ExportArguments(groups.Model, groups.Dtype, groups.Tokenizer, groups.Overwrite, groups.Config):
    to: Literal["gpt2", "llama", "qwen3", "gguf", "onnx", "hfllm", "whole"] = option(
        help="A native class of transformers, a file format, hfllm's class (from a native one), or a checkpoint in "
        "pieces made whole."
    )
    model = differs(help="Folder or Hub id of the model: hfllm's, or a native gpt2, llama or qwen3.")
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = differs(
        help="Data type of the weights; q8_0 (8 bits) is for gguf, and onnx is float32."
    )
    output_dir = differs("out/export", help="Folder to make.")
    overwrite_output_dir = differs(help="Replace an earlier export in output_dir.")

    def check(self) -> None:
        """Validate options that do not need the model."""
        source, target = Path(self.model).expanduser().resolve(), Path(self.output_dir).expanduser().resolve()
        if source.is_dir() and target in (source, *source.parents):
            raise ValueError(f"--output_dir {self.output_dir} is the model's own folder. Choose another folder.")
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ValueError(f"--dtype q8_0 is for --to gguf; --to {self.to} takes float32, bfloat16 or float16.")
        if self.to == "onnx" and self.dtype not in (None, "float32"):
            raise ValueError(f"--dtype {self.dtype}: an ONNX file is in float32. Leave --dtype out.")
        if self.to == "whole" and self.dtype is not None:
            raise ValueError(f"--dtype {self.dtype}: --to whole leaves the weights as they are. Leave --dtype out.")
        if self.to == "whole" and not is_sharded(source):
            raise ValueError(f"{self.model!r} is not in pieces: --to whole is for a checkpoint of a sharded run.")
        if self.to != "whole" and is_sharded(source):
            raise ValueError(
                f"{self.model!r} is in pieces, one for each process of a sharded run. Make it whole first, by --to "
                f"whole, and then export that folder --to {self.to}."
            )


def main(args: ExportArguments) -> None:
    args.check()
    disable_progress_bar()
    claim = claim_folder(
        args.output_dir,
        recipe="export",
        overwrite=args.overwrite_output_dir,
        inputs=inputs_of(args),
    )
    with claim as folder:
        if args.to == "whole":
            make_whole(args, folder)
            return
        # 1. The model and its tokenizer
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.tokenizer or args.model)
        check_fit(args, model, tokenizer)
        print(f"{args.model}: {type(model).__name__}, {model.num_parameters():,} parameters in {name_of(model.dtype)}")
        context, num_prompt_tokens = model.config.max_position_embeddings, len(tokenizer(PROMPT).input_ids)
        identity = {
            "to": args.to,
            "dtype": args.dtype or name_of(model.dtype),
            "model_sha256": hash_model(args.model, revision=getattr(model.config, "_commit_hash", None)),
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        }
        folder.check_same(identity)

        # 2. The same model in the other form: written, read back, compared, and only then in place of an earlier one
        if folder.is_finished():
            print(f"{args.output_dir} holds this export already: nothing to do.")
        else:
            write = {"gguf": write_gguf, "onnx": write_onnx}.get(args.to, write_folder)
            with folder.writing() as partial:
                write(args, model, tokenizer, partial)
                folder.begin(identity)
            folder.finish(files=folder.moved)

    # 3. Where it is, and commands that open it
    tell(args, folder, num_tokens=max(1, min(32, context - num_prompt_tokens)))


def tell(args: ExportArguments, folder: RunFolder, *, num_tokens: int) -> None:
    files = [folder.path / name for name in folder.record["finished"]["files"]]
    path = next((file for file in files if file.suffix in (".gguf", ".onnx")), folder.path)
    print(f"Done: {path}, {sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB. To try it:")
    for command in commands_to_open(args.to, path, num_tokens=num_tokens):
        print(f"\n    {command}")


def make_whole(args: ExportArguments, folder: RunFolder) -> None:
    """Put the pieces of a checkpoint together, tensor by tensor: no memory has to hold the model."""
    source = Path(args.model).expanduser()
    if fault := find_checkpoint_fault(source):
        raise ValueError(f"The checkpoint {source} is broken: {fault}. Take another one.")
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    identity = {
        "to": args.to,
        "model_sha256": hash_model(source),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
    }
    folder.check_same(identity)
    if folder.is_finished():
        print(f"{args.output_dir} holds this export already: nothing to do.")
    else:
        with folder.writing() as partial:
            consolidate_checkpoint(source, partial)
            save_tokenizer(tokenizer, partial)
            num_tensors = 0
            with safe_open(partial / "model.safetensors", "pt") as written:
                for name, tensor in iterate_tensors(source, "model"):
                    if not torch.equal(written.get_tensor(name), tensor):
                        raise RuntimeError(f"{name}, read back from the disk, differs from its pieces.")
                    num_tensors += 1
            print(f"  the {num_tensors:,} tensors read back are the same as their pieces")
            folder.begin(identity)
        folder.finish(files=folder.moved)
    context = AutoConfig.from_pretrained(folder.path).max_position_embeddings
    tell(args, folder, num_tokens=max(1, min(32, context - len(tokenizer(PROMPT).input_ids))))


def load_model(name: str) -> PreTrainedModel:
    """The model as it is; a LoRA adapter, such as a checkpoint of a fine-tuning run, merged into its base."""
    if (base := base_of_adapter(name)) is None:
        return load_causal_lm(name)
    from hfllm.adapters import load_adapter, merge_adapter  # imports PEFT

    return merge_adapter(load_adapter(load_model(base), name))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer as it is: unlike in training, no bos token is added."""
    try:
        return AutoTokenizer.from_pretrained(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"No tokenizer in {name!r}: {reason} Give its folder or Hub id as --tokenizer.") from error


def check_fit(args: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the model cannot be exported so, or does not fit the dtype or the tokenizer."""
    is_ours = isinstance(model, GPTForCausalLM)
    if is_ours and args.to == "hfllm":
        raise ValueError(
            f"{args.model!r} is an hfllm model already. It can be exported to {', '.join(NATIVE_TYPES)}, gguf or onnx."
        )
    if not is_ours and args.to in NATIVE_TYPES:
        native_type = model.config.model_type
        raise ValueError(f"{args.model!r} is a native {native_type} already. Export it to hfllm, gguf or onnx.")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} ids, but the model's vocab_size is {model.config.vocab_size:,}: it "
            "belongs to another model. Give this model's own as --tokenizer."
        )
    dtype = getattr(torch, args.dtype or "", model.dtype)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite: the training of this model failed.")
        if not parameter.to(dtype).isfinite().all():
            raise ValueError(
                f"--dtype {args.dtype}: {name} has weights up to {parameter.abs().max():,.0f}, and the largest "
                f"{args.dtype} is {torch.finfo(dtype).max:,.0f}. Use bfloat16."
            )


def write_folder(
    args: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> str:
    """Write a folder for `from_pretrained`, of a native class or of hfllm's own."""
    twin = from_native(model) if args.to == "hfllm" else to_native(model, args.to)
    twin = twin.to(getattr(torch, args.dtype or "", model.dtype))
    save_model(twin, tokenizer, folder)
    dtype, is_rounded = twin.dtype, twin.dtype not in (model.dtype, torch.float32)
    del twin

    # Everything below reads what was written to the disk.
    written_tokenizer = AutoTokenizer.from_pretrained(folder)
    if differences := comparison.tokenizer_differences(tokenizer, written_tokenizer):
        raise RuntimeError(
            "\n  - ".join(["The tokenizer read back by AutoTokenizer differs from the one written:", *differences])
        )
    print(f"  the tokenizer read back gives the same ids for {len(comparison.HARD_TEXTS)} hard texts")

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.float()
    prompts = prompts_for(model, written_tokenizer)
    if is_rounded:
        # The effect of rounding is printed; the export is then compared with the rounded original.
        print(f"  rounding to {name_of(dtype)}: {comparison.compare_logits(model, written, prompts)}")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
    check_same_model(model, written, prompts)
    return ""


def prompts_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """A text, and random ids of several lengths, up to the context."""
    vocab_size, context = model.config.vocab_size, model.config.max_position_embeddings
    longest = min(context, 128)
    text = tokenizer(" ".join(comparison.HARD_TEXTS), return_tensors="pt").input_ids[:, :longest]
    lengths = sorted({1, min(7, longest), min(33, longest), longest})
    return [text, *comparison.random_prompts(vocab_size, lengths)]


def check_same_model(original: PreTrainedModel, written: PreTrainedModel, prompts: list[torch.Tensor]) -> None:
    """Raise a RuntimeError unless both have the same logits and the same greedy text."""
    logits = comparison.compare_logits(original, written, prompts)
    tolerance = TOLERANCE * max(1.0, logits.largest_logit)
    if not logits.largest_difference <= tolerance:
        raise RuntimeError(f"The logits differ by more than {tolerance:.1e}: {logits}. Nothing was exported.")
    print(f"  logits: {logits} (allowed: {tolerance:.1e})")

    num_tokens = min(NUM_GREEDY_TOKENS, original.config.max_position_embeddings - 1)
    num_same = num_ties = 0
    for prompt in prompts[:3]:  # decoding is slow: the text and the shortest prompts are enough
        prompt = prompt[:, : original.config.max_position_embeddings - num_tokens]
        expected, margins = comparison.greedy_tokens(original, prompt, num_tokens)
        found, _ = comparison.greedy_tokens(written, prompt, num_tokens)
        for expected_row, found_row, margin in zip(expected, found, margins):
            differing = (expected_row != found_row).nonzero().flatten()
            # If two tokens are equally likely within the tolerance, either may be chosen, and the texts differ.
            if len(differing) > 0 and margin[differing[0]] > 2 * tolerance:
                raise RuntimeError(
                    f"After {prompt.tolist()} the original writes {expected_row.tolist()}, and the export "
                    f"{found_row.tolist()}. Nothing was exported."
                )
            num_ties += len(differing) > 0
            num_same += len(differing) == 0
    ties = f" ({num_ties} differ at two equally likely tokens)" if num_ties else ""
    print(f"  greedy: the same {num_tokens} tokens after {num_same} prompts{ties}")


def write_gguf(args: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write one file for llama.cpp, with the tokenizer and the chat template in it."""
    from hfllm.conversion.gguf import export_gguf
    from hfllm.conversion.gguf_verification import verify_gguf

    native = to_native(model) if isinstance(model, GPTForCausalLM) else model
    source, dtype = Path(args.model).expanduser(), GGUF_DTYPES[args.dtype or name_of(model.dtype)]
    file = folder / f"{(source.resolve() if source.is_dir() else source).name}-{dtype}.gguf"
    try:
        export_gguf(native, tokenizer, file, dtype=dtype)
    except ImportError as error:  # the error says what to install
        raise RuntimeError(str(error)) from error
    print_indented(verify_gguf(file, native, tokenizer))
    return file.name


def write_onnx(args: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write one file for onnxruntime, with the tokenizer's files beside it."""
    from hfllm.conversion.onnx import export_onnx, verify_onnx

    file = export_onnx(model, folder / "model.onnx")
    print_indented(f"logits by onnxruntime: {verify_onnx(file, model)}")
    save_tokenizer(tokenizer, folder)
    return file.name


def print_indented(text: object) -> None:
    print(textwrap.indent(str(text), "  "))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def commands_to_open(to: str, path: Path, *, num_tokens: int) -> list[str]:
    """Commands to copy that use the export."""
    if to == "gguf":
        return [f"llama-cli -m {shlex.quote(str(path))} -p '{PROMPT}' -n {num_tokens}"]
    if to == "onnx":
        feeds = "{'input_ids': ids, 'attention_mask': ids * 0 + 1, 'position_ids': ids - 1}"
        run_it = f"onnxruntime.InferenceSession({str(path)!r}).run(None, {feeds})"
        return [f'python -c "import numpy, onnxruntime; ids = numpy.array([[1, 2, 3]]); print({run_it})"']
    imports = "import hfllm; " if to in ("hfllm", "whole") else ""
    pipeline = f"pipeline('text-generation', {str(path)!r})('{PROMPT}', max_new_tokens={num_tokens})"
    commands = [f'python -c "{imports}from transformers import pipeline; print({pipeline})"']
    return commands if to in ("hfllm", "whole") else [*commands, f"vllm serve {shlex.quote(str(path))}"]


if __name__ == "__main__":
    run(main, ExportArguments, description=__doc__)
