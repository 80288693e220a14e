"""Access to llama.cpp, if installed: the npm package node-llama-cpp has it prebuilt, and llama_cpp.mjs runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


PACKAGE = "node-llama-cpp"
NODE_MODULES_VARIABLE = "HFLLM_NODE_MODULES"
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")


@dataclass(frozen=True)
class LlamaCpp:
    """The programs for llama.cpp: `node` (20 or newer), and the package's folder."""

    node: str
    package: Path


def find_llama_cpp(node_modules: str | os.PathLike | None = None) -> LlamaCpp | None:
    """node-llama-cpp in the given folder, in $HFLLM_NODE_MODULES, or in the folder beside this Python.

    Raises:
        ValueError: if a folder was named and does not hold it, or there is no node to run it.
    """
    named = node_modules if node_modules is not None else os.environ.get(NODE_MODULES_VARIABLE)
    folder = Path(named) if named else _default_folder() / "node_modules"
    package = folder.expanduser().resolve() / PACKAGE
    node = shutil.which("node")
    if package.is_dir() and node is not None:
        return LlamaCpp(node, package)
    if named:
        missing = (
            f"no {PACKAGE} in {str(folder)!r}" if not package.is_dir() else "no program node (20 or newer) on PATH"
        )
        raise ValueError(f"llama.cpp was to be found in {str(folder)!r}, but there is {missing}. {how_to_get()}")
    return None


def _default_folder() -> Path:
    return Path(sys.prefix) / "llama.cpp"


def how_to_get() -> str:
    return f"To install it (Node.js 20 or newer): npm install --prefix {_default_folder()} {PACKAGE}"


def ask_llama_cpp(llama_cpp: LlamaCpp, job: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Run llama_cpp.mjs, whose head lists what a job holds; `timeout` is in seconds.

    Raises:
        RuntimeError: if llama.cpp refuses the file, crashes, or takes longer.
    """
    with tempfile.TemporaryDirectory(prefix="hfllm-llama-cpp-") as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps({**job, "package": str(llama_cpp.package)}), encoding="utf-8")
        process = subprocess.Popen(
            [llama_cpp.node, str(SCRIPT), str(job_file), str(result_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that all processes that it starts end with it
        )
        try:
            _, messages = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"llama.cpp did not answer within {timeout:,.0f} s about {job['model']}.") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode != 0 or not result_file.is_file():
            tail = "\n".join(messages.strip().splitlines()[-15:])
            raise RuntimeError(f"llama.cpp failed on {job['model']} (exit status {process.returncode}):\n{tail}")
        return json.loads(result_file.read_text(encoding="utf-8"))
