"""Masks and positions of packed documents: where positions restart within a row, a new document starts.

This file travels with every checkpoint: it imports third-party packages only.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.utils.import_utils import is_tracing


def build_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> torch.Tensor | None:
    """The causal mask in the form the attention backend wants, which also keeps packed documents apart.

    transformers looks for restarting positions only when there is neither a mask nor a cache; with either, documents
    silently see each other. Here a mask of ones, a padding mask and an empty cache change nothing.
    """
    if isinstance(attention_mask, dict):  # `generate` prepares one for a static cache
        return attention_mask["full_attention"]
    documents = find_documents(attention_mask, position_ids, cache)
    # By position, because transformers renames these arguments between releases.
    if documents is None:
        return create_causal_mask(config, inputs_embeds, attention_mask, cache)
    is_full = attention_mask is None or (not is_tracing(attention_mask) and bool(attention_mask.all()))
    if "flash" in config._attn_implementation and (inputs_embeds.shape[0] > 1 or not is_full):
        raise ValueError(
            f"{config._attn_implementation!r} keeps packed documents apart only in a single row without padding. Load "
            "the model with attn_implementation='sdpa' or 'flex_attention', or pass one row at a time, without padding "
            "and attention_mask."
        )
    if is_full and may_ask(documents):
        return create_causal_mask(config, inputs_embeds, None, None, position_ids)
    return create_causal_mask(
        config,
        inputs_embeds,
        None if is_full else attention_mask,
        None,
        and_mask_function=packed_sequence_mask_function(documents.expand(inputs_embeds.shape[0], -1)),
    )


def find_documents(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, cache: Cache | None
) -> torch.Tensor | None:
    """The number (B, T) of the document that each token belongs to; None if no row is seen to hold more than one."""
    if position_ids is None or position_ids.shape[-1] == 1:
        return None
    if attention_mask is not None and len(attention_mask.shape) != 2:
        return None
    length = position_ids.shape[-1]
    is_static = getattr(cache, "is_compileable", False)
    if is_static and is_tracing(position_ids):
        return None
    seen = cache.get_seq_length() if cache is not None else 0
    restarts = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        # Padding may repeat positions: a restart counts only between two tokens that are not padding.
        is_text = attention_mask[:, seen : seen + length].bool()
        if is_text.shape[-1] != length or attention_mask.shape[-1] != length + seen:
            return None
        restarts = restarts & is_text[:, 1:] & is_text[:, :-1]
    if may_ask(restarts) and not restarts.any():
        return None
    if is_static or seen > 0:
        if not may_ask(restarts):
            return None
        raise ValueError(
            "The position_ids restart, as where a new document starts in a packed row, but with a cache that is "
            f"{'static' if is_static else 'not empty'} the documents would see each other. Pass no cache, or each "
            "document in a row of its own."
        )
    return nn.functional.pad(restarts.cumsum(-1), (1, 0))


def may_ask(tensor: torch.Tensor) -> bool:
    """Whether Python may read the tensor's values: not where they are traced, nor in training on an accelerator.

    Reading makes Python wait until the accelerator has computed them, and the accelerator then waits for Python. So
    there, position_ids that are given always count as those of packed documents; the result is the same.
    """
    return not is_tracing(tensor) and (tensor.device.type == "cpu" or not torch.is_grad_enabled())


def count_positions(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | dict | None, cache: Cache | None
) -> torch.Tensor:
    """Positions (B or 1, T) of the new tokens: after the cached ones, and counted without padding on the left."""
    length = inputs_embeds.shape[1]
    seen = cache.get_seq_length() if cache is not None else 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and isinstance(seen, int):
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return positions[:, seen : seen + length].to(inputs_embeds.device)
    return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
