"""transformers' own sharding in two directions, FSDP and tensor parallelism, holds for our model class."""

import json
import sys

import numpy as np
import pytest
import torch

import hfllm
from tests.conftest import make_tiny_config
from tests.distributed import both_ways
from tests.distributed.launching import ROOT, run


def launch(source, target, fsdp_size: int, tp_size: int, steps: range) -> dict:
    target.mkdir()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={fsdp_size * tp_size}"]
    words += [str(ROOT / "tests" / "distributed" / "both_ways.py"), str(source), str(target)]
    finished = run([*words, *map(str, (fsdp_size, tp_size, steps.start, steps.stop))])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads((target / "answer.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["modern", "book"])
def test_a_model_cut_in_both_directions_takes_the_steps_of_one_process_and_resumes_on_another_mesh(tmp_path, preset):
    """Packed rows with unequal targets; losses, norms over both meshes, weights; 2 x 2 processes, then 1 x 2."""
    model = hfllm.GPTForCausalLM(make_tiny_config(preset))
    model.save_pretrained(tmp_path / "start")
    first = launch(tmp_path / "start", tmp_path / "first", 2, 2, range(2))
    second = launch(tmp_path / "first", tmp_path / "second", 1, 2, range(2, 4))

    optimizer = both_ways.build_optimizer(model.train())
    expected = [both_ways.take_step(model, optimizer, step) for step in range(4)]
    losses, norms = zip(*expected)
    assert min(norms) > both_ways.MAX_NORM  # or nothing would tell of the clipping
    np.testing.assert_allclose(first["losses"] + second["losses"], losses, rtol=1e-6)
    np.testing.assert_allclose(first["norms"] + second["norms"], norms, rtol=2e-6)
    assert first["meshes"] == ["('fsdp',)", "('fsdp', 'tp')"]
    weights = torch.load(tmp_path / "second" / "weights.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=1e-4, msg=name)
