"""Processes that share Muon's work take the steps of one that does all of it, to the bit."""

import json

import pytest
import torch
from accelerate import Accelerator

from tests.distributed import muon_steps
from tests.distributed.launching import ROOT, command, run


pytestmark = pytest.mark.slow
LAUNCHES = {
    "DDP of 1": ("ddp.yaml", 1),
    "DDP of 2": ("ddp.yaml", 2),
    "DDP of 4": ("multi_cpu.yaml", 4),
    "FSDP2 of 2": ("fsdp2.yaml", 2),
    "FSDP2 of 4": ("fsdp2.yaml", 4),
    "HSDP of 2 x 2": ("hsdp.yaml", 4, "--parallelism_config_dp_shard_size", 2),
}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict]:
    accelerator = Accelerator(cpu=True)
    expected = {}
    for name in muon_steps.VARIANTS:
        parts = muon_steps.build(name, accelerator)
        muon_steps.train(*parts, accelerator, steps=1)
        muon_steps.train(*parts, accelerator, steps=3)
        expected[name] = muon_steps.gather(*parts, accelerator)
    return expected


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_steps_of_processes_that_share_the_work_are_those_of_one_to_the_bit(one_process, tmp_path, launch):
    config, num_processes, *options = LAUNCHES[launch]
    script = str(ROOT / "tests" / "distributed" / "muon_steps.py")
    finished = run([*command(config, num_processes, *options), script, str(tmp_path)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    answers = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(num_processes)]
    assert {answer["num_processes"] for answer in answers} == {num_processes}

    # Stacks of 2 of 36 x 36, 2 of 18 x 36 and 3 of 50 x 36 or its transpose; and of three times as many.
    shares = {1: (7, 21), 2: (1 + 1 + 2, 3 + 3 + 5), 4: (1 + 1 + 1, 2 + 2 + 3)}[num_processes]
    for name, expected in one_process.items():
        num_blocks, _ = muon_steps.VARIANTS[name]
        counts = [answer[f"orthogonalized of {name}"] for answer in answers]
        assert max(counts) == shares[num_blocks == 3] and sum(counts) == 7 * num_blocks
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        assert sum("momentum_buffer" in key for key in found) == 7 * num_blocks
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)

    # By columns nothing is shared, and the step is right all the same.
    assert torch.equal(torch.load(tmp_path / "columns.pt"), muon_steps.columns_step())

    # A gradient that the owner lacks neither hangs nor passes for an update.
    expected_finite = [[True, True]] + [[False, True]] * (num_processes - 1)
    assert [answer["lonely"] for answer in answers] == expected_finite
