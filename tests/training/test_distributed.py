"""Two processes over gloo write, read and count what one process does. Run by torchrun, this file is they."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file

import hfllm
from hfllm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from hfllm.training.evaluation import evaluate_rows
from hfllm.training.lock import run_lock
from hfllm.training.optimization import build_adamw
from tests.conftest import make_tiny_config


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CountingRows:
    """Five rows, so that of two processes one has three and the other two."""

    num_bytes = 100

    def __len__(self):
        return 5

    def batch(self, indices: np.ndarray, count_once: bool = True) -> dict[str, torch.Tensor]:
        input_ids = torch.from_numpy(indices)[:, None] * 7 + torch.arange(16)
        labels = torch.where(torch.arange(16) < 4 + 2 * torch.from_numpy(indices)[:, None], input_ids + 1, -100)
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(16).expand(len(indices), -1),
            "shift_labels": labels,
        }


def build(accelerator, seed=0):
    torch.manual_seed(seed)
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    return accelerator.prepare(model, optimizer)


def train(model, optimizer, steps, accelerator):
    """Each process takes its share of four rows a step."""
    for step in steps:
        rows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        own = rows[accelerator.process_index :: accelerator.num_processes]
        accelerator.backward(model(input_ids=own, labels=own, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()


def two_processes(kind: str, folder: Path) -> None:
    plugin = None
    if kind == "fsdp2":
        # Without an accelerator accelerate believes that FSDP is not for this machine.
        PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["GPTDecoderLayer"],
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.num_processes == 2
    assert accelerator.is_fsdp2 == (kind == "fsdp2")

    with run_lock(folder / kind, accelerator=accelerator):
        model, optimizer = build(accelerator, seed=1)
        loaded = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
        state = load_checkpoint(latest_checkpoint(folder / "single", accelerator=accelerator), **loaded)
        assert state == {"step": 2}
        save_checkpoint(folder / kind / "unchanged", state=state, **loaded)
        train(model, optimizer, range(2, 4), accelerator)
        path = save_checkpoint(folder / kind / "straight", state={"step": 4}, **loaded)
        result = evaluate_rows(model, CountingRows(), batch_size=1, accelerator=accelerator)
        outcome = {"loss": result.loss, "num_tokens": result.num_tokens}
        # A save that fails on the main process fails on both.
        try:
            save_checkpoint(path / "state.json", state={"step": 4}, **loaded)
        except Exception as error:
            outcome["error"] = f"{type(error).__name__}: {error}"

        accelerator.free_memory()
        model, optimizer = build(accelerator, seed=2)
        loaded = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
        load_checkpoint(folder / kind / "unchanged" / "step-00000002", **loaded)
        train(model, optimizer, range(2, 4), accelerator)
        save_checkpoint(folder / kind / "resumed", state={"step": 4}, **loaded)
    (folder / f"{kind}-{accelerator.process_index}.json").write_text(json.dumps(outcome))
    del loaded
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_resume_what_one_began_and_the_other_way_round(tmp_path, kind):
    accelerator = Accelerator(cpu=True)
    model, optimizer = build(accelerator)
    single = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
    train(model, optimizer, range(2), accelerator)
    path = save_checkpoint(tmp_path / "single", state={"step": 2}, **single)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, kind, str(tmp_path)], check=True, env=environment, cwd=root, timeout=300)

    # Read by two processes and written again, every file has the same bytes.
    for file in FILES:
        assert (path / file).read_bytes() == (tmp_path / kind / "unchanged" / path.name / file).read_bytes()

    # Two processes that stop and resume end where two that go straight on do, to the last bit.
    straight, resumed = (tmp_path / kind / name / "step-00000004" for name in ("straight", "resumed"))
    for file in FILES:
        assert (straight / file).read_bytes() == (resumed / file).read_bytes()

    # One process ends there too, up to the order of its sums, and evaluates to the same number.
    train(model, optimizer, range(2, 4), accelerator)
    by_two = load_file(straight / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in by_two:
            torch.testing.assert_close(by_two[name], tensor, atol=1e-5, rtol=1e-4)
    load_checkpoint(straight, **single)
    expected = evaluate_rows(model, CountingRows(), batch_size=5, accelerator=accelerator)
    for index in range(2):
        outcome = json.loads((tmp_path / f"{kind}-{index}.json").read_text())
        assert outcome["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert outcome["num_tokens"] == expected.num_tokens == 4 + 6 + 8 + 10 + 12
        assert "state.json" in outcome["error"]
    assert not (tmp_path / kind / ".lock").exists()


if __name__ == "__main__":
    two_processes(sys.argv[1], Path(sys.argv[2]))
