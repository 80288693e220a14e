"""Launches as a user types them: `accelerate launch --config_file accelerate_configs/X.yaml --num_processes N ...`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfllm.runs.log import read_log


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
PROBE = ROOT / "tests" / "distributed" / "probe.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

# Where DeepSpeed is installed: here, or beside these packages, as `make install-deepspeed` does it.
BESIDE = Path(sys.prefix) / "deepspeed" / "bin" / "python"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED and not BESIDE.exists(), reason="needs deepspeed: make install-deepspeed"
)


def command(config: str | Path, num_processes: int, *launcher_options: object) -> list[str]:
    """The launcher, up to the script. In float32, for the files ask for bf16; on whichever port is free."""
    config = CONFIGS / config if isinstance(config, str) else config
    python = BESIDE if "deepspeed" in config.name and not HAS_DEEPSPEED else sys.executable
    words = (python, "-m", "accelerate.commands.launch", "--config_file", config)
    words += ("--num_processes", num_processes, "--mixed_precision", "no", "--main_process_port", 0, *launcher_options)
    return [str(word) for word in words]


def environment(**variables: str) -> dict[str, str]:
    launched = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of a launch that these tests are in
    own = {name: value for name, value in os.environ.items() if name not in launched}
    return {**own, **ENVIRONMENT, **variables}


def run(words: list[str], *, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=timeout
    )


def probe(folder: Path, config: str | Path, num_processes: int, *launcher_options: object) -> list[dict]:
    """What each process of a launch says about itself and the gradient it helped to make, see probe.py."""
    finished = run([*command(config, num_processes, *launcher_options), str(PROBE), str(folder)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def recipe(options: dict[str, object]) -> list[str]:
    return ["recipes/pretrain.py", *(f"--{name}={value}" for name, value in options.items())]


def pretrain(
    config: str | Path, num_processes: int, options: dict[str, object], *launcher_options: object
) -> dict[str, list]:
    """The log of a run of recipes/pretrain.py, by columns: loss, grad_norm, eval_loss and so on."""
    finished = run([*command(config, num_processes, *launcher_options), *recipe(options)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return columns(options["output_dir"])


def columns(output_dir: object) -> dict[str, list]:
    entries = read_log(Path(str(output_dir)) / "log.jsonl")
    names = {name for entry in entries for name in entry}
    return {name: [entry[name] for entry in entries if name in entry] for name in names}
