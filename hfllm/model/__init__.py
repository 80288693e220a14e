"""The GPT, known to transformers' Auto classes as soon as this package is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_gpt import PRESETS, GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTForSequenceClassification, GPTModel, GPTPreTrainedModel


# `Auto*.register` lets Auto classes open our checkpoints without `trust_remote_code`; `register_for_auto_class` makes
# `save_pretrained` and `push_to_hub` carry the model's files, for readers without hfllm.
AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
GPTConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, GPTModel),
    (AutoModelForCausalLM, GPTForCausalLM),
    (AutoModelForSequenceClassification, GPTForSequenceClassification),
):
    auto_class.register(GPTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "PRESETS",
    "GPTConfig",
    "GPTForCausalLM",
    "GPTForSequenceClassification",
    "GPTModel",
    "GPTPreTrainedModel",
]
