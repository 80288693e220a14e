"""Train your own language model from raw text to a chatbot; every artefact is a Hugging Face artefact.

Importing hfllm registers its GPT with transformers, so that `AutoModelForCausalLM.from_pretrained(folder)` opens it.
"""

import gc


# Imports create half a million objects and no garbage. The garbage collector would search them again and again, which
# takes a quarter of the time.
_is_collecting = gc.isenabled()
gc.disable()

from .conversion import from_native, to_native
from .model import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, GPTModel
from .tokenization import train_bpe


if _is_collecting:
    gc.enable()

__version__ = "0.1.0.dev0"

__all__ = [
    "GPTConfig",
    "GPTForCausalLM",
    "GPTForSequenceClassification",
    "GPTModel",
    "__version__",
    "from_native",
    "to_native",
    "train_bpe",
]
