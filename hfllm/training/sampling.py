"""What a model writes while it learns."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def draw_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_tokens: int) -> str:
    """What the model writes after the prompt (default: a document's start), one token drawn after the other.

    Of the 50 likeliest tokens each, at temperature 0.8; `num_tokens` at most, and no more than the model has room for.
    """
    was_training = model.training
    model.eval()
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    if input_ids.shape[1] == 0:
        input_ids = torch.tensor([[tokenizer.eos_token_id]])
    num_tokens = min(num_tokens, model.config.max_position_embeddings - input_ids.shape[1])
    tokens = model.generate(
        input_ids.to(model.device), max_new_tokens=num_tokens, do_sample=True, temperature=0.8, top_k=50
    )
    model.train(was_training)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
