"""Every accelerate file launches what it says, also on this machine; silent alternatives of accelerate are refused."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.distributed import probe as probe_script
from tests.distributed.launching import CONFIGS, PROBE, command, needs_deepspeed, probe, run


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_key_of_its_files(path):
    """accelerate's loader stops at an unknown key of the first level, and says nothing of the others."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        assert set(getattr(config, section)) <= set(known), section


def test_an_unknown_key_of_a_file_is_an_error(tmp_path):
    content = yaml.safe_load((CONFIGS / "ddp.yaml").read_text())
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**content, "num_proceses": 2}))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "typo.yaml"))


def gradient_norm_of_one_process() -> float:
    """By torch alone: the same rows in one batch."""
    model, rows = probe_script.make_model(), probe_script.make_rows()
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    return float(torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]))


def check(folder: Path, num_processes: int, sharding: str, answers: list[dict]) -> None:
    assert [answer["process"] for answer in answers] == list(range(num_processes))
    for answer in answers:
        assert answer["num_processes"] == num_processes
        assert answer["sharding"] == sharding
        assert answer["grad_norm"] == pytest.approx(gradient_norm_of_one_process(), rel=1e-6)
        assert answer["sees_infinity"]
    before, after = (folder / name / "step-00000000" / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.slow
def test_fsdp2_shards_on_any_machine(tmp_path):
    """The default run's own launch; the others are slow."""
    check(tmp_path, 2, "FSDP2", probe(tmp_path, "fsdp2.yaml", 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "num_processes", "sharding", "options"),
    [
        ("cpu.yaml", 1, "", []),
        ("multi_cpu.yaml", 2, "DDP", []),
        ("ddp.yaml", 2, "DDP", []),
        ("fsdp2.yaml", 1, "FSDP2", []),
        ("hsdp.yaml", 4, "HSDP 2 x 2", ["--parallelism_config_dp_shard_size", 2]),
        pytest.param("deepspeed_zero2.yaml", 2, "ZeRO-2", [], marks=needs_deepspeed),
        pytest.param("deepspeed_zero3.yaml", 2, "ZeRO-3", [], marks=needs_deepspeed),
    ],
)
def test_a_launch_is_what_its_file_says(tmp_path, config, num_processes, sharding, options):
    check(tmp_path, num_processes, sharding, probe(tmp_path, config, num_processes, *options))


def changed(tmp_path: Path, name: str, **changes: object) -> Path:
    path = tmp_path / name
    path.write_text(yaml.safe_dump({**yaml.safe_load((CONFIGS / name).read_text()), **changes}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "num_processes", "options", "message"),
    [
        ("multi_cpu.yaml", {"distributed_type": "MULTI_CPU"}, 2, [], "accelerate_configs/multi_cpu.yaml"),
        ("cpu.yaml", {}, 2, [], "accelerate has started this one only"),
        ("fsdp2.yaml", {"fsdp_config": {"fsdp_reshard_after_forward": "FULL_SHARD"}}, 2, [], "fsdp_version: 2"),
        ("hsdp.yaml", {}, 2, [], "2 processes were launched for 2 groups of 4"),
        ("fsdp2.yaml", {"parallelism_config": {"parallelism_config_tp_size": 2}}, 2, [], "tp_size"),
    ],
)
def test_a_launch_that_would_be_another_one_is_refused(tmp_path, name, changes, num_processes, options, message):
    answers = tmp_path / "answers"
    answers.mkdir()
    words = command(changed(tmp_path, name, **changes), num_processes, *options)
    finished = run([*words, str(PROBE), str(answers)], timeout=120)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert not list(answers.iterdir())
