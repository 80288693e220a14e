"""Generation past the learned positions, and the cache under either of its names.

Rotary positions have no end and do not need this: transformers continues them by `config.rope_parameters`.

This file travels with every checkpoint: it imports third-party packages only.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging


logger = logging.get_logger(__name__)

# transformers 5.24 renamed `past_key_values` to `cache`: in what `generate` passes, in outputs, and in layers.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def accept_past_key_values(forward: Callable) -> Callable:
    """Let `forward(cache=...)` be called with `past_key_values=...` too, the name before transformers 5.24."""
    signature = inspect.signature(forward)
    *parameters, var_keyword = signature.parameters.values()
    old_name = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if "past_key_values" in kwargs:
            past_key_values = kwargs.pop("past_key_values")
            if past_key_values is not None:
                if kwargs.get("cache") is not None:
                    raise ValueError("cache and past_key_values are two names of one argument. Pass one of them.")
                kwargs["cache"] = past_key_values
        return forward(*args, **kwargs)

    # `generate` asks the signature which arguments there are.
    wrapper.__signature__ = signature.replace(parameters=[*parameters, old_name, var_keyword])  # type: ignore[attr-defined]
    return wrapper


class EmptyCache(DynamicCache):
    """A cache that keeps nothing: each pass computes all tokens that it is given."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class SlidingGenerationMixin(GenerationMixin):
    """transformers' generation, which past the learned positions predicts from the last ones.

    The window slides as chapter 4 crops its input: its tokens are counted from 0 again. So each token changes its
    position at each step, no earlier key or value is valid, and each further token costs a pass over the window. The
    caller's cache stays as it is: it holds the beginning of the text, which the window no longer reads.
    """

    config: Any
    model: Any

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """The inputs of the next step; past the learned positions, the last `max_position_embeddings` tokens."""
        cache_name = "cache" if "cache" in kwargs else "past_key_values"
        cache, attention_mask, position_ids = map(kwargs.get, (cache_name, "attention_mask", "position_ids"))
        length = max(part.shape[-1] for part in (input_ids, attention_mask, position_ids) if part is not None)
        is_full = getattr(cache, "is_compileable", False) and 0 <= cache.get_max_length() < length
        if not self._must_slide(length, position_ids, is_full):
            if is_full:
                raise ValueError(
                    f"The cache has room for {cache.get_max_length()} tokens, and the text has {length}. Make it with "
                    "max_cache_len=<tokens of the prompt + max_new_tokens>, or pass cache_implementation='static' and "
                    "no cache."
                )
            return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

        window = self.config.max_position_embeddings
        if inputs_embeds is not None:  # the prompt's; what was generated since are ids
            generated = input_ids[:, input_ids.shape[1] - (length - inputs_embeds.shape[1]) :]
            generated_embeds = self.get_input_embeddings()(generated.to(inputs_embeds.device))
            inputs_embeds = torch.cat([inputs_embeds, generated_embeds], dim=1)[:, -window:]
        elif input_ids.shape[1] < window:
            raise ValueError(
                f"The text has {length} tokens, more than the model's {window} learned positions, so its last {window} "
                f"are computed again; but only {input_ids.shape[1]} input_ids were given. Pass those of the cached "
                "tokens as well."
            )
        is_text = input_ids.new_ones(input_ids.shape[0], length) if attention_mask is None else attention_mask
        self._check_counting(is_text, position_ids)
        logger.warning_once(
            f"The text is longer than the model's {window} learned positions: each further token is predicted from the "
            f"last {window} tokens, at the cost of a pass over all of them."
        )
        kwargs["position_ids"] = (is_text[:, -window:].long().cumsum(-1) - 1).clamp(min=0)
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask[:, -window:]
        if cache is not None:
            kwargs[cache_name] = EmptyCache()
        kwargs.pop("next_sequence_length", None)
        kwargs["is_first_iteration"] = inputs_embeds is not None
        return super().prepare_inputs_for_generation(input_ids[:, -window:], inputs_embeds=inputs_embeds, **kwargs)

    def _must_slide(self, length: int, position_ids: torch.Tensor | None, is_full: bool) -> bool:
        if not self.model.learned_positions or length <= self.config.max_position_embeddings:
            return False
        # Padding on the left takes columns of the cache, but no positions.
        return is_full or position_ids is None or int(position_ids.max()) >= self.config.max_position_embeddings

    @staticmethod
    def _check_counting(is_text: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Refuse positions that do not count a row's tokens from 0, as the window does."""
        if is_text.dim() != 2:
            raise ValueError(
                f"Past the learned positions the window slides, for which the attention_mask must be (batch, length) "
                f"instead of {tuple(is_text.shape)}."
            )
        if position_ids is None:
            return
        counted = (is_text.long().cumsum(-1) - 1)[:, -position_ids.shape[-1] :]
        differs = (position_ids.to(counted.device) != counted) & is_text[:, -position_ids.shape[-1] :].bool()
        if differs.any():
            raise ValueError(
                "Past the learned positions the window slides and is counted from 0, but these position_ids do not "
                "count a row's tokens from 0. Pad on the left (tokenizer.padding_side = 'left'), and leave "
                "position_ids out."
            )

    # Two private methods of transformers. If a release renames them, chunks are an error (above), and assisted decoding
    # past the learned positions fails the tests; nothing else of generation depends on them.

    def _prefill(self, input_ids: torch.Tensor, generation_config: Any, *args, **kwargs):
        # Chunks of a prompt that does not fit would fill a cache that nothing reads.
        if self.model.learned_positions and input_ids.shape[1] > self.config.max_position_embeddings:
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        """transformers' own, which past the learned positions proposes nothing.

        Assisted decoding checks several tokens in one pass, but there each of them has a window of its own.
        """
        generator = super()._get_candidate_generator(*args, **kwargs)
        if not self.model.learned_positions:
            return generator
        propose, update = generator.get_candidates, generator.update_candidate_strategy
        limit = self.config.max_position_embeddings

        def get_candidates(input_ids, *args, **kwargs):
            if input_ids.shape[1] >= limit:
                return input_ids, None
            candidate_ids, logits = propose(input_ids, *args, **kwargs)
            return candidate_ids[:, :limit], None if logits is None else logits[:, : limit - input_ids.shape[1]]

        def update_candidate_strategy(input_ids, *args, **kwargs):
            if input_ids.shape[1] <= limit:
                update(input_ids, *args, **kwargs)

        generator.get_candidates = get_candidates
        generator.update_candidate_strategy = update_candidate_strategy
        return generator
