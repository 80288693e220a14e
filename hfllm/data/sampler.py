"""The order of rows: a pure function of (seed, epoch, index).

Training reads an endless sequence of positions 0, 1, 2, ... Position p is row p % num_rows of epoch p // num_rows, in
that epoch's order. A step takes the next rows_per_step positions, and only then are they cut among micro-batches and
processes. So one number, the step, is the whole state of the data: a run resumes exactly, on any number of processes
with any accumulation, as long as rows_per_step, the rows and the seed stay the same.
"""

import functools

import numpy as np


def rows_at(positions: np.ndarray, *, num_rows: int, seed: int) -> np.ndarray:
    """The row at each position of the endless training order; every epoch visits every row exactly once."""
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: there are no rows to put in order.")
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_rows)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _order_of_epoch(num_rows, seed, epoch)[places[here]]
    return rows


def rows_of_step(
    step: int,
    *,
    rows_per_step: int,
    num_rows: int,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
    accumulation: int = 1,
) -> list[np.ndarray]:
    """The rows that one process reads in a step, one array per micro-batch.

    The step's rows, as a sequence, are cut into `accumulation` micro-batches, and each of these into `num_processes`
    shares: all processes and micro-batches together read the same rows, however they are cut.
    """
    if rows_per_step % (num_processes * accumulation):
        raise ValueError(
            f"rows_per_step={rows_per_step} cannot be cut evenly among num_processes={num_processes} and "
            f"accumulation={accumulation}: choose a multiple of {num_processes * accumulation}."
        )
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process_index={process_index}, but num_processes={num_processes}.")
    positions: np.ndarray = np.arange(step * rows_per_step, (step + 1) * rows_per_step, dtype=np.int64)
    rows = rows_at(positions, num_rows=num_rows, seed=seed).reshape(accumulation, num_processes, -1)
    return list(rows[:, process_index])


@functools.lru_cache(maxsize=2)  # a step can cross from one epoch into the next
def _order_of_epoch(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    # Not Generator.permutation: numpy promises that the bits of PCG64 never change, but not what a Generator makes of
    # them, and a run resumed with a later numpy must keep the same order.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_rows), kind="stable")
