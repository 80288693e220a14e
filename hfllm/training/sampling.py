"""Samples of text from a model in training."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def draw_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, num_tokens: int) -> str:
    """The prompt and what the model writes after it; an empty prompt is the start of a document.

    Each token is sampled from the 50 most likely ones, at temperature 0.8. There are at most `num_tokens`, and no more
    than fit into the context.
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
