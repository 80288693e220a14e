"""Work that the main process does for all processes."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def on_main_process(accelerator: Accelerator | None, function: Callable[[], Any]) -> Any:
    """The result of `function` on the main process, for every process; an error there is raised in all of them."""
    result, error = None, None
    if accelerator is None or accelerator.is_main_process:
        try:
            result = function()
        except Exception as caught:
            error = caught
    if accelerator is not None and accelerator.num_processes > 1:
        message = None if error is None else f"{type(error).__name__} in the main process: {error}"
        result, message = broadcast_object_list([result, message])
        if message is not None and error is None:
            raise RuntimeError(message)
    if error is not None:
        raise error
    return result
