import pytest
from transformers import LlamaConfig

from hfllm.training.footprint import training_memory


@pytest.mark.slow
def test_the_memory_of_training_is_at_least_what_must_be_held_and_not_what_the_imports_hold():
    """16 bytes for each of 14 million weights: itself, its gradient and AdamW's two means."""
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000, tie_word_embeddings=True, **sizes)
    num_weights = 2 * (4 * 768 * 768 + 3 * 768 * 1536) + 1000 * 768
    num_bytes = training_memory(config, num_rows=1, block_size=16)
    assert 16 * num_weights < num_bytes < 16 * num_weights + 150 * 2**20
