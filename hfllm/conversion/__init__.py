"""Weights in and out: transformers' native gpt2, llama and qwen3 classes, GGUF and ONNX."""

from .comparison import LogitComparison, compare_logits
from .native import NATIVE_TYPES, from_native, native_obstacles, to_native


__all__ = ["NATIVE_TYPES", "LogitComparison", "compare_logits", "from_native", "native_obstacles", "to_native"]
