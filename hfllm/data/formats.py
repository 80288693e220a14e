"""Bytes and text of files: format and compression by the name's endings, the encoding by the first bytes."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

import pyarrow as pa


# One document a file, unless a separator cuts it.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
SOURCE_CODE: tuple[str, ...] = tuple(
    """
    .py .pyi .c .h .cc .cpp .hpp .cs .go .hs .java .jl .js .jsx .kt .lisp .lua .ml .php .pl .r .rb .rs .scala .sh .sql
    .swift .ts .tsx
    """.split()  # noqa: SIM905
)
TEXT = (*PROSE, *SOURCE_CODE)

# A record a line, object or row.
JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)
TABLES = (".csv", ".tsv")
ARROW = (".parquet", ".arrow")

SUFFIXES = (*TEXT, *JSON_LINES, *JSON, *TABLES, *ARROW)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ = f".txt, .md, .rst and other text, source code (.py, .c, ...), {', '.join((*JSON_LINES, *JSON, *TABLES, *ARROW))}"
READ += f", each also compressed ({', '.join(COMPRESSIONS)})"

PIECE_CHARACTERS = 1 << 20  # how much of a text file is in memory at a time
SAMPLE_BYTES = 1 << 12

# In this order, because the mark of UTF-32 begins with the mark of UTF-16. Both codecs remove the mark.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# The first bytes of files that people take for text, and the next step.
UNPACK = "unpack it and name the folder"
SIGNATURES = {
    b"PK\x03\x04": f"a Zip archive; {UNPACK}",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Microsoft Office file; save its text as .txt, or its table as .csv",
    b"%PDF-": "a PDF; extract its text, for example with pdftotext",
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz after its format, as in texts.jsonl.gz",
    b"BZh91AY&SY": "compressed by bzip2; let its name end in .bz2 after its format, as in texts.jsonl.bz2",
    b"\xfd7zXZ\x00": "compressed by xz; let its name end in .xz after its format, as in texts.jsonl.xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; let its name end in .zst after its format, as in texts.jsonl.zst",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {UNPACK}",
    b"Rar!\x1a\x07": f"a RAR archive; {UNPACK}",
    b"PAR1\x15": "a Parquet file; let its name end in .parquet",
    b"ARROW1\x00": "an Arrow file; let its name end in .arrow",
    b"SQLite format 3\x00": "an SQLite database; export its table as .csv",
    b"\x89HDF\r\n": "an HDF5 file; export its texts as .jsonl",
    b"\x93NUMPY": "a NumPy array; save its texts as .jsonl",
    b"GGUF\x03\x00\x00\x00": "a GGUF model, not text",
    b"\x7fELF": "a program, not text",
    b"\x89PNG\r\n": "a picture, not text",
    b"\xff\xd8\xff": "a picture, not text",
}
ZIPPED = {
    (".xlsx", ".xlsm"): "an Excel workbook; save its sheet as .csv",
    (".ods",): "a spreadsheet; save its sheet as .csv",
    (".docx", ".odt", ".pptx", ".epub"): "a document with markup; save its text as .txt",
}

# Errors raised when damaged compressed or Arrow data is read; an OSError with a number comes from the disk.
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException, UnicodeError)


def format_of(path: Path) -> str:
    """The ending that names a file's format: `.jsonl` of `a.JSONL` and `a.jsonl.gz`; "" if there is none."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in one of COMPRESSIONS."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        return io.BufferedReader(_ArrowStream(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))
    return path.open("rb")


class _ArrowStream(io.RawIOBase):
    """Arrow's stream as a Python raw stream. Arrow is installed anyway and reads zstd; Python does from 3.14 on."""

    def __init__(self, stream: pa.NativeFile):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def open_text(path: Path, *, newline: str) -> TextIO:
    """The file's text without its byte-order mark. Undecodable bytes become surrogates, for `text_problem`."""
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors=errors, newline=newline)


def read_lines(path: Path) -> Iterator[str]:
    """The file's lines with their ends. A line ends at a line feed only: other separators are text, as in a cell."""
    with open_text(path, newline="\n") as file:
        yield from file


def encoding_of(path: Path) -> str:
    """The encoding that the file's byte-order mark names; without one, UTF-8."""
    with open_bytes(path) as file:
        start = file.read(4)
    return next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "utf-8")


def refusal(path: Path) -> str | None:
    """Why a file whose name says text, JSON or a table is neither, by its first bytes; None if nothing is wrong."""
    with open_bytes(path) as file:
        start = file.read(SAMPLE_BYTES)
    for signature, what in SIGNATURES.items():
        if start.startswith(signature):
            by_name = (text for suffixes, text in ZIPPED.items() if path.suffix.lower() in suffixes)
            return f"the file is {next(by_name, what)}"
    if start[257:262] == b"ustar":
        return f"the file is a tar archive; {UNPACK}"
    if not start.startswith(tuple(MARKS)) and start.count(0) > 0.4 * len(start):
        even = start[::2].count(0) > start[1::2].count(0)
        return (
            "half of its bytes are NUL, as in UTF-16 without a byte-order mark; convert it with: iconv -f "
            f"{'UTF-16BE' if even else 'UTF-16LE'} -t UTF-8 {path.name}"
        )
    return None


def decoding_problem(path: Path) -> str | None:
    """The place of the file's first byte that is not text, or None."""
    encoding = encoding_of(path)
    name = encoding.removesuffix("-sig").upper()
    decoder = codecs.getincrementaldecoder(encoding.removesuffix("-sig"))()
    offset, line, ended = 0, 1, False
    with open_bytes(path) as file:
        while not ended:
            chunk = file.read(PIECE_CHARACTERS)
            ended = not chunk
            undecoded = len(decoder.getstate()[0])  # the first bytes of a character that the last chunk cut
            try:
                text = decoder.decode(chunk, final=ended)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(error.encoding, errors="ignore").count("\n")
                place = f"at byte {offset - undecoded + error.start:,}"
                return f"line {line:,} holds bytes that are not {name} ({place})"
            offset += len(chunk)
            line += text.count("\n")
    return None
