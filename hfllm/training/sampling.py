"""Samples of text from a model in training."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def draw_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_tokens: int) -> str:
    """The prompt and what the model writes after it; an empty prompt is the start of a document.

    Each token is sampled from the 50 most likely ones, at temperature 0.8. There are at most `num_tokens`, and no more
    than fit into the context. If a prompt fills the context, only its last tokens are used: up to half of the context
    is kept free for new tokens.
    """
    was_training = model.training
    model.eval()
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    if input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])
    context = model.config.max_position_embeddings
    if input_ids.shape[1] >= context:
        input_ids = input_ids[:, -max(1, context - min(num_tokens, context // 2)) :]
    num_tokens = max(1, min(num_tokens, context - input_ids.shape[1]))
    # Each token has another length: nothing is compiled for it, and attention by blocks is made for whole rows.
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if attention == "flex_attention" else attention)
    with torch.compiler.set_stance("force_eager"):
        tokens = model.generate(
            input_ids.to(model.device), max_new_tokens=num_tokens, do_sample=True, temperature=0.8, top_k=50
        )
    model.set_attn_implementation(attention)
    model.train(was_training)
    # If the sample ends inside a character of several bytes, the incomplete character decodes to U+FFFD.
    return tokenizer.decode(tokens[0], skip_special_tokens=True).rstrip("\ufffd")
