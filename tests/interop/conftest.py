"""Other libraries open our folders by their path, like any other model.

The folder is what a run of `recipes/pretrain.py` leaves: a modern GPT and its tokenizer, here untrained and tiny.
"""

from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hfllm
from tests.conftest import make_tiny_config


# Every Linear of a modern GPT but its head. PEFT knows no default for our model type.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# A training of seconds that writes nothing but its output: for TrainingArguments and all that descend from it.
QUIET_TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(autouse=True)
def _leave_no_accelerator_behind():
    """A Trainer decides precision and device for the whole process; the next test decides again."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return hfllm.train_bpe(topics.values(), vocab_size=512, model_max_length=128)


@pytest.fixture(scope="session")
def save_gpt(tokenizer, tmp_path_factory) -> Callable[..., str]:
    """Save an untrained GPT of a preset and the tokenizer; returns the folder's path."""

    def save(preset: str, model_class: type[PreTrainedModel] = hfllm.GPTForCausalLM, **overrides) -> str:
        torch.manual_seed(0)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "max_position_embeddings": 128}
        folder = tmp_path_factory.mktemp(preset)
        model_class(make_tiny_config(preset, **{**sizes, **ids, **overrides})).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def folder(save_gpt) -> str:
    """A modern GPT, whose two key and value heads serve four query heads."""
    return save_gpt("modern", num_key_value_heads=2)


@pytest.fixture
def model(folder) -> hfllm.GPTForCausalLM:
    return hfllm.GPTForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def output_dir(tmp_path) -> str:
    return str(tmp_path / "out")


def texts_of_length(tokenizer: PreTrainedTokenizerBase, lengths: list[int]) -> list[str]:
    """Different English texts of about that many tokens each."""
    assert len(lengths) <= len(topics)
    return [
        tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:length])
        for text, length in zip(sorted(topics.values(), key=len, reverse=True), lengths)
    ]


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The log-probability (T - 1,) of each token after the first, given those before it: one row, no mask, no cache."""
    logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def logged(trainer, name: str) -> list[float]:
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
