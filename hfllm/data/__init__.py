"""Text -> rows: documents of any source, split, encoded, packed, and read in an order that resumes exactly."""

from .corpus import Corpus, load_corpus, split_documents
from .packing import Rows, prepare_rows
from .sampler import rows_at, rows_of_step


__all__ = ["Corpus", "Rows", "load_corpus", "prepare_rows", "rows_at", "rows_of_step", "split_documents"]
