"""Tasks of lm-eval, on a model that is already loaded."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


def find_tasks(names: Sequence[str], *, include_path: str | None = None) -> Any:
    """lm-eval's `TaskManager`, which also knows the YAML tasks of the folder `include_path`.

    Raises:
        ValueError: lm-eval is not installed, or knows no task of such a name; says the nearest one.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("tasks needs lm-eval: pip install -e '.[interop]'.") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path} is not a folder.")
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            raise ValueError(
                f"lm-eval knows no task {name!r}{f'; did you mean {nearest[0]!r}?' if nearest else '.'} "
                "For tasks of your own, give the folder of their YAML files as include_path."
            )
    return manager


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    *,
    names: Sequence[str],
    batch_size: int,
    limit: int | None = None,
) -> dict[str, float | None]:
    """`test_<task>_<metric>` of each task, on its first `limit` examples if given."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # With add_bos_token lm-eval would count the start token as a prediction.
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
    found = lm_eval.simple_evaluate(
        language_model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return numbers_of(found["results"])


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """lm-eval's results by our names, without what is no score; None where one is not finite, as JSON has no NaN."""
    return {
        f"test_{task}_{metric.removesuffix(',none').replace(',', '_')}": float(value) if math.isfinite(value) else None
        for task, numbers in results.items()
        for metric, value in numbers.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }
