"""torchao through transformers: our Linear layers load in eight bits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.interop.conftest import LINEAR_LAYERS


pytestmark = pytest.mark.slow

quantization = pytest.importorskip("torchao.quantization")


def test_eight_bit_weights_keep_the_logits_near_and_save_three_quarters_of_the_memory(folder, model, tmp_path):
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    quantized = {name for name, weight in small.named_parameters() if type(weight).__name__ == "Int8Tensor"}
    assert {name.split(".")[-2] for name in quantized} == set(LINEAR_LAYERS)
    assert len(quantized) == len(LINEAR_LAYERS) * model.config.num_hidden_layers
    weight, original = small.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.int8 and weight.qdata.shape == original.shape
    # One scale for each output channel: a weight is off by half a step, and a step is the largest weight / 127.
    steps = original.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight.dequantize() - original).abs() / steps).max() < 0.75
    assert small.lm_head.weight is small.model.embed_tokens.weight

    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        logits, exact = small(ids).logits, model(ids).logits
    assert 0 < (logits - exact).abs().mean() < 0.1 * exact.std()
    assert torch.equal(
        small.generate(ids, max_new_tokens=1, do_sample=False)[:, -1], logits[:, -1].argmax(-1)
    )  # the cache and the mask work with it too

    small.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
