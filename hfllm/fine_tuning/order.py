"""The order of rows in fine-tuning: a function of seed and epoch, the same in a resumed run."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler


BATCHES_IN_A_POOL = 50  # the rows of this many batches are sorted by length together


class RowOrder(Sampler[int]):
    """The order of an epoch's rows, in whole batches; a function of seed and epoch, the same in every process.

    `by_length` puts rows of similar lengths into a batch, and the batches in random order. Batches from long to short
    would go from one label to the other if length depends on the label (spam is long). Rows beyond the last whole
    batch, different ones in each epoch, are left out with `drop_last`, so that every step is the mean over the same
    number of rows; without it they come last.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, by_length: bool, seed: int, drop_last: bool = True):
        self.lengths, self.batch_size, self.by_length, self.seed = lengths, batch_size, by_length, seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        num_whole = len(self.lengths) // self.batch_size * self.batch_size
        return num_whole if self.drop_last and num_whole else len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))[: len(self)].tolist()
        if not self.by_length:
            return iter(order)
        num_whole = len(order) // self.batch_size * self.batch_size
        order, rest = order[:num_whole], order[num_whole:]
        pool = BATCHES_IN_A_POOL * self.batch_size
        order = [
            row
            for first in range(0, len(order), pool)
            for row in sorted(order[first : first + pool], key=lambda row: self.lengths[row])
        ]
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        return iter([row for index in generator.permutation(len(batches)) for row in batches[index]] + rest)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Set the epoch of a prepared loader's sampler, through all of accelerate's wrappers.

    accelerate's own `set_epoch` does not reach the sampler if several processes skip batches after a resume: the rest
    of the epoch would have the order of the first epoch.
    """
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
