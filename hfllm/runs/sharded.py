"""Tensors in pieces: one safetensors file of each process, and one file made of all of them.

    model.shard-0001-of-0004.safetensors        the pieces that the first of four processes held

A piece stands under its tensor's name. The header's metadata tells its place: `{"step": "100", "pieces": {"weight":
{"offset": [2, 0], "shape": [8, 8], "dtype": "float32"}}}`, the shape being that of the whole tensor. Any process can
so read any part of a tensor, however it was cut. Nothing is pickled.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .files import flush


SHARD_NAME = re.compile(r"(?P<kind>\w+)\.shard-(?P<index>\d{4,})-of-(?P<number>\d{4,})\.safetensors")


class Piece(NamedTuple):
    """A part of a tensor: where it begins in each dimension, and the shape of the whole."""

    tensor: torch.Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where a piece is stored: in which file, and which part of the tensor it is."""

    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor that is stored in pieces; `format` is its data type in the words of safetensors."""

    shape: tuple[int, ...]
    dtype: str
    format: str
    places: list[Place]

    @property
    def meta(self) -> torch.Tensor:
        """A tensor without memory of the same shape and type."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


Index = dict[str, Stored]


def shard_names(kind: str, number: int) -> list[str]:
    return [f"{kind}.shard-{index:04d}-of-{number:04d}.safetensors" for index in range(1, number + 1)]


def num_shards(names: Iterable[str]) -> int:
    """In how many files of a kind the tensors are, by the names of a folder's files; 0 if they are whole."""
    return max((int(match["number"]) for name in names if (match := SHARD_NAME.fullmatch(name))), default=0)


def is_sharded(folder: str | Path) -> bool:
    """Whether a folder holds a model in pieces, as a run of a sharded model saves it."""
    return num_shards(path.name for path in Path(folder).glob("model.shard-*")) > 0


def write_shard(path: Path, pieces: dict[str, Piece], *, step: int) -> None:
    """Write the pieces of one process, and have the system write them to the disk."""
    places = {
        name: {"offset": piece.offset, "shape": piece.shape, "dtype": str(piece.tensor.dtype).removeprefix("torch.")}
        for name, piece in pieces.items()
    }
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    save_file(tensors, path, metadata={"step": str(step), "pieces": json.dumps(places)})
    flush(path)


def read_index(folder: str | Path, kind: str) -> Index:
    """Every tensor of a kind by name, from the headers of its files.

    Raises:
        ValueError: a file is missing, pieces of a tensor are, or files contradict each other.
    """
    folder = Path(folder)
    index: Index = {}
    step = None
    for name in shard_names(kind, num_shards(path.name for path in folder.glob(f"{kind}.shard-*"))):
        header = _read_header(folder / name)
        metadata = header.pop("__metadata__")
        step = metadata["step"] if step is None else step
        if metadata["step"] != step:
            raise ValueError(f"{name} is of step {metadata['step']}, and the files before it are of step {step}")
        places = json.loads(metadata["pieces"])
        for tensor, entry in header.items():
            shape, offset = tuple(places[tensor]["shape"]), tuple(places[tensor]["offset"])
            stored = index.setdefault(tensor, Stored(shape, places[tensor]["dtype"], entry["dtype"], []))
            if (stored.shape, stored.format) != (shape, entry["dtype"]):
                raise ValueError(f"{tensor} is {shape} in {name}, and {stored.shape} in the files before it")
            stored.places.append(Place(name, offset, tuple(entry["shape"])))
    for tensor, stored in index.items():
        if sum(math.prod(place.size) for place in stored.places) != math.prod(stored.shape):
            raise ValueError(f"pieces of {tensor} are missing")
    return index


def find_fault(folder: str | Path, kinds: Iterable[str], *, step: int) -> str | None:
    """The first contradiction between the headers of files that must be of this step, or None."""
    folder = Path(folder)
    for kind in kinds:
        try:
            for name in shard_names(kind, num_shards(path.name for path in folder.glob(f"{kind}.shard-*"))):
                if (own := _read_header(folder / name)["__metadata__"]["step"]) != str(step):
                    return f"{name} is of step {own}"
            read_index(folder, kind)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"the {kind}'s pieces do not fit together ({error})"
    return None


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file")
        return json.loads(file.read(length))


class PieceReader:
    """Reads parts of the tensors in a folder, by its index; opens each file when it is first needed."""

    def __init__(self, folder: str | Path, index: Index):
        self.folder, self.index = Path(folder), index
        self.files: dict[str, Any] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "PieceReader":
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()
        self.files.clear()

    def read(self, name: str, offset: Iterable[int] | None = None, size: Iterable[int] | None = None) -> torch.Tensor:
        """The part of a tensor that begins at `offset` and has this `size`, by default all of it, in memory of its own.

        Every piece that overlaps the part is read, and of it only what overlaps.
        """
        stored = self.index[name]
        offset = tuple(offset or [0] * len(stored.shape))
        part = torch.empty(stored.shape if size is None else tuple(size), dtype=getattr(torch, stored.dtype))
        for place in stored.places:
            ranges = [
                (max(own, wanted), min(own + own_size, wanted + wanted_size))
                for own, own_size, wanted, wanted_size in zip(place.offset, place.size, offset, part.shape, strict=True)
            ]
            if any(first >= last for first, last in ranges):
                continue
            if not ranges:  # a single number
                part.copy_(self._open(place.file).get_tensor(name))
                continue
            source = tuple(slice(first - own, last - own) for (first, last), own in zip(ranges, place.offset))
            target = tuple(slice(first - own, last - own) for (first, last), own in zip(ranges, offset))
            part[target] = self._open(place.file).get_slice(name)[source]
        return part

    def _open(self, file: str) -> Any:
        if file not in self.files:
            self.files[file] = self.stack.enter_context(safe_open(self.folder / file, "pt"))
        return self.files[file]


def consolidate(folder: str | Path, kind: str, path: str | Path) -> None:
    """Write one safetensors file of all the pieces of a kind, as `save_file` would; holds one tensor at a time."""
    index = read_index(folder, kind)
    # safetensors orders by size of the numbers and then by name, so that each tensor is aligned.
    names = sorted(index, key=lambda name: (-index[name].meta.element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        first, end = end, end + index[name].meta.nbytes
        header[name] = {
            "dtype": index[name].format,
            "shape": list(index[name].shape),
            "data_offsets": [first, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with Path(path).open("wb") as file, PieceReader(folder, index) as reader:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(_bytes_of(reader.read(name)))


def iterate_tensors(folder: str | Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a kind with its name, put together."""
    index = read_index(folder, kind)
    with PieceReader(folder, index) as reader:
        for name in index:
            yield name, reader.read(name)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
