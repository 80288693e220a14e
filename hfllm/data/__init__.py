"""From text to rows: documents of any source, split, encoded, packed, and read in an order that resumes exactly."""

from .corpus import Corpus, load_corpus, split_documents
from .packing import Rows, prepare_rows
from .sampler import rows_at, rows_of_step
from .shards import Shards, find_shards, hold_out
from .streaming import RowStream, merge_states


__all__ = [
    "Corpus",
    "RowStream",
    "Rows",
    "Shards",
    "find_shards",
    "hold_out",
    "load_corpus",
    "merge_states",
    "prepare_rows",
    "rows_at",
    "rows_of_step",
    "split_documents",
]
