"""Export of a causal language model to an ONNX file, for onnxruntime and other programs that read it."""

import copy
import importlib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .comparison import LogitComparison, compare_logits, random_prompts


INPUT_NAMES = ("input_ids", "attention_mask", "position_ids")
AXIS_NAMES = ("batch_size", "sequence_length")

# Opset 20 has GELU in one node; onnxruntime reads it since 1.17 (January 2024).
OPSET = 20

# A protobuf holds at most 2 GiB. Beyond this many bytes the weights go into a second file, beside the first.
SINGLE_FILE_BYTES = 3 * 2**29

# Rotary frequencies that depend on the longest position of a batch; a graph has only one set of them.
CHANGING_ROPE_TYPES = ("dynamic", "longrope")


class LogitsOnly(nn.Module):
    """The model as a function of the three inputs, without a cache."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.model(**inputs, use_cache=False).logits


def export_onnx(model: PreTrainedModel, path: str | Path) -> Path:
    """Write a causal language model, ours or a native one, as an ONNX file in float32; returns its path.

    The inputs are `input_ids`, `attention_mask` and `position_ids`, int64 of shape (B, T) with any B and T; the output
    is `logits` (B, T, V). All three are needed: positions count from 0 without padding on the left, as in
    `(attention_mask.cumsum(-1) - 1).clip(0)`. Where they restart within a row, our own models keep the two documents
    apart, as in PyTorch; native ones do so only without a mask, so not here. Logits at padding mean nothing. A position
    beyond learned ones is an error of the runtime.

    The graph has no cache of keys and values: each call computes the whole text, which suits scoring and short
    generation. Programs that generate with their own cache (optimum, transformers.js, onnxruntime-genai) need more
    inputs than these.

    Weights beyond 1.5 GiB go into a second file, `<name>_data`, which must stay beside the first. The files are written
    elsewhere, checked by onnx, and renamed, so they are whole or absent. `verify_onnx` compares the logits.

    Raises:
        ValueError: for a model that has no such graph; says why.
        RuntimeError: if a package is missing.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(
            f"{str(path)!r} does not end in .onnx; give the file's name, such as {str(path / 'model.onnx')!r}."
        )
    _check_model(model)
    onnx, onnx_ir = _import("onnx"), _import("onnx_ir")
    _import("onnx_ir.passes.common")
    _import("onnxscript")  # torch.onnx needs it

    graph_model = _trace(model).model
    # torch writes into every node the files and lines that it came from: private paths and, for a small model, most of
    # the file.
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(graph_model)
    graph_model.graph.name = model.config.model_type
    graph_model.metadata_props.update(_describe(model))
    num_bytes = sum(value.const_value.nbytes for value in graph_model.graph.initializers.values())

    path.parent.mkdir(parents=True, exist_ok=True)
    data_name = f"{path.name}_data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        onnx_ir.save(graph_model, made, external_data=data_name if num_bytes > SINGLE_FILE_BYTES else None)
        onnx.checker.check_model(str(made), full_check=True)
        if (made_data := Path(folder) / data_name).exists():
            made_data.replace(path.with_name(data_name))
        else:
            path.with_name(data_name).unlink(missing_ok=True)  # an older, larger model's
        made.replace(path)
    return path


def verify_onnx(path: str | Path, model: PreTrainedModel, *, tolerance: float = 1e-4) -> LogitComparison:
    """Compare the logits of an ONNX file, run by onnxruntime on the CPU, with those of the model it was made from.

    The batches differ from the one that the graph was traced with: one token; several rows; the whole context, or as
    much of it as has 64 Mi logits; and rows padded on the left and on the right. `tolerance` is relative to the model's
    largest logit, if that is above 1.

    Raises:
        ValueError: if the logits differ by more: the file belongs to another model, or is broken.
        RuntimeError: if a package is missing.
    """
    session = open_onnx(path)
    model = _in_float32(model)
    vocab_size, context = model.config.vocab_size, _context(model)
    longest = min(context, max(2, 2**26 // vocab_size))
    short, middle = min(5, longest), min(17, longest)

    prompts = [
        *random_prompts(vocab_size, [1, longest], num_rows=1, seed=0),
        *random_prompts(vocab_size, [1, short, middle], num_rows=3, seed=1),
    ]
    masks = [torch.ones_like(prompt) for prompt in prompts]
    for padding_side in ("left", "right"):
        prompts += random_prompts(vocab_size, [middle], num_rows=3, seed=2)
        lengths = torch.tensor([[middle], [max(1, middle // 2)], [1]])
        mask = (torch.arange(middle) < lengths).long()
        masks.append(mask.flip(-1) if padding_side == "left" else mask)

    def expected(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return LogitsOnly(model)(input_ids, attention_mask, count_positions(attention_mask))

    def found(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        return run_onnx(session, input_ids, attention_mask, count_positions(attention_mask))

    with _ready(model):
        comparison = compare_logits(expected, found, prompts, attention_mask=masks)
    if not comparison.largest_difference <= tolerance * max(1.0, comparison.largest_logit):
        raise ValueError(
            f"{path} does not give the logits of this {type(model).__name__}: {comparison}. It was made from another "
            "model, or from other weights; export it again."
        )
    return comparison


def open_onnx(path: str | Path) -> Any:
    """An onnxruntime session on the CPU."""
    onnxruntime = _import("onnxruntime")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. export_onnx writes one.")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_onnx(
    session: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> np.ndarray:
    """The logits (B, T, V) in float32."""
    inputs = zip(INPUT_NAMES, (input_ids, attention_mask, position_ids))
    return session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs})[0]


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T), counted without padding on the left."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _trace(model: PreTrainedModel) -> Any:
    # Two rows and eight tokens, because torch would make a length of 1 a constant. Both are variable in the graph.
    input_ids = torch.zeros(2, min(8, _context(model)), dtype=torch.long)
    attention_mask = torch.ones_like(input_ids)
    example = (input_ids, attention_mask, count_positions(attention_mask))
    any_shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}

    model = _in_float32(model)
    with _ready(model), _quiet():
        function = LogitsOnly(model).eval()
        exported = torch.export.export(function, example, dynamic_shapes=(any_shape,) * 3)
        program = torch.onnx.export(
            exported, input_names=INPUT_NAMES, output_names=["logits"], opset_version=OPSET, verbose=False
        )
    assert program is not None
    shapes = [value.shape for value in program.model.graph.inputs]
    if len(shapes) != 3 or any(isinstance(axis, int) for shape in shapes for axis in shape):
        raise ValueError(
            f"The graph of this {type(model).__name__} is bound to one shape: its inputs are "
            f"{program.model.graph.inputs}. Its forward depends on them in a way that torch.export does not support."
        )
    program.rename_axes({axis: name for shape in shapes for axis, name in zip(shape, AXIS_NAMES)})
    return program


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise ValueError(f"A {name} is an adapter around a model: merge it first, model.merge_and_unload().")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"A {name} is not a model of transformers. Load it with AutoModelForCausalLM.")
    missing = set(INPUT_NAMES) - set(inspect.signature(model.forward).parameters)
    if missing or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"A {name} is not a causal language model that takes {', '.join(INPUT_NAMES)} and gives logits. "
            "Load the checkpoint with AutoModelForCausalLM."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"This {name} is quantized in a way that ONNX does not have. Export the weights it was made "
            "from, and quantize the file with onnxruntime.quantization."
        )
    rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type in CHANGING_ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_type!r} computes its frequencies from the longest position of each batch, and a graph "
            "has one set of them. 'llama3', 'linear' and 'yarn' can be exported."
        )
    if (context := _context(model)) < 4:
        raise ValueError(f"A context of {context} tokens is too short for a graph of any length; 4 are needed.")


def _context(model: PreTrainedModel) -> int:
    return model.config.max_position_embeddings


def _describe(model: PreTrainedModel) -> dict[str, str]:
    names = ("model_type", "max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    values = {name: getattr(model.config, name) for name in names}
    return {name: str(value) for name, value in values.items() if value is not None}


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if it is in float32 on the CPU, or else such a copy."""
    if all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()):
        return model
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32)


@contextmanager
def _ready(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, no dropout and no gradients, and the attention that the exporter supports."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's remarks about packages that it does not need, and about torch's own code."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"ONNX needs the package {name!r}, which is not installed: pip install -e '.[export]'."
        ) from error


__all__ = ["count_positions", "export_onnx", "open_onnx", "run_onnx", "verify_onnx"]
