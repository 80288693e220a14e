"""The environment of a run: versions and hardware, without anything that identifies the machine."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil


ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "huggingface_hub", "hfllm")


def save_environment(folder: str | Path, *, num_processes: int = 1) -> None:
    """Write `environment.json` into a run's folder: versions, processors, memory; no names of hosts, users or paths."""
    content = json.dumps(describe_environment(num_processes=num_processes), indent=2) + "\n"
    (Path(folder) / ENVIRONMENT_FILE).write_text(content, encoding="utf-8")


def describe_environment(*, num_processes: int = 1) -> dict[str, Any]:
    """Names and values for people to read; memory in GiB."""
    environment: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": _accelerators(),
        "processes": num_processes,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            environment[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path is not installed
            continue
    return environment


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["Apple GPU (MPS)"] if torch.backends.mps.is_available() else []
