"""Note a recipe's exit code for scripts around `accelerate launch`, which ends with 1 for any failure."""

import contextlib
import os
import sys
from collections.abc import Iterator


# Names a file, which accelerate_configs/supervise.sh and slurm.sbatch make and read.
VARIABLE = "HFLLM_EXIT_CODES"


@contextlib.contextmanager
def noted_exit_code() -> Iterator[None]:
    """When the block exits, add the exit code as a line to the file that HFLLM_EXIT_CODES names, if it names one."""
    try:
        yield
    except SystemExit as exit_:
        _note(exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None))
        raise
    except BaseException:
        _note(1)
        raise
    _note(0)


def _note(code: int) -> None:
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123  (one write, so that no process tears another's)
            file.write(f"{code}\n")
    except OSError as error:
        print(f"The exit code {code} could not be noted in {path} ({error.strerror}).", file=sys.stderr)
