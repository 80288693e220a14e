import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfllm.runs.manifest import describe_file, find_fault, write_manifest
from hfllm.runs.sharded import (
    Piece,
    PieceReader,
    consolidate,
    is_sharded,
    iterate_tensors,
    num_shards,
    read_index,
    shard_names,
    write_shard,
)
from hfllm.runs.sharded import find_fault as find_fault_of_pieces


@pytest.fixture
def tensors():
    numbers = torch.arange(40.0)
    return {
        "matrix": numbers.reshape(8, 5),
        "bfloat": numbers[:6].to(torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
        "ünicode": numbers[:2].clone(),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    """Two files: a matrix cut in both dimensions into four pieces, of which the first file has three."""
    matrix = tensors["matrix"]
    first = {
        "matrix": Piece(matrix[:3, :].contiguous(), (0, 0), (8, 5)),
        "bfloat": Piece(tensors["bfloat"][2:].clone(), (2,), (6,)),
        "ünicode": Piece(tensors["ünicode"], (0,), (2,)),
    }
    second = {
        "matrix": Piece(matrix[3:, :].contiguous(), (3, 0), (8, 5)),
        "bfloat": Piece(tensors["bfloat"][:2].clone(), (0,), (6,)),
        "count": Piece(tensors["count"], (), ()),
        "none": Piece(tensors["none"], (0, 0), (0, 4)),
    }
    for name, pieces in zip(shard_names("model", 2), (first, second)):
        write_shard(tmp_path / name, pieces, step=7)
    return tmp_path


def test_the_pieces_put_together_are_the_tensors(folder, tensors):
    assert is_sharded(folder) and num_shards(path.name for path in folder.iterdir()) == 2
    found = dict(iterate_tensors(folder, "model"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("first", "last"), [((0, 0), (8, 5)), ((2, 1), (4, 3)), ((0, 4), (3, 5)), ((7, 0), (8, 5)), ((3, 3), (3, 3))]
)
def test_any_part_of_a_tensor_can_be_read_however_it_was_cut(folder, tensors, first, last):
    size = [end - begin for begin, end in zip(first, last)]
    with PieceReader(folder, read_index(folder, "model")) as reader:
        part = reader.read("matrix", first, size)
    assert torch.equal(part, tensors["matrix"][first[0] : last[0], first[1] : last[1]])


def test_the_file_made_of_the_pieces_is_the_one_that_safetensors_writes(folder, tensors, tmp_path):
    consolidate(folder, "model", tmp_path / "own")
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    own, expected = load_file(tmp_path / "own"), load_file(tmp_path / "expected")
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.fault(21)
def test_a_file_of_pieces_holds_numbers_and_json_alone(folder):
    content = (folder / "model.shard-0001-of-0002.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"]["step"] == "7"
    assert json.loads(header["__metadata__"]["pieces"])["bfloat"] == {"offset": [2], "shape": [6], "dtype": "bfloat16"}
    assert len(content) == 8 + length + sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    )


@pytest.mark.fault(3)
def test_files_that_do_not_belong_together_are_told_apart(folder, tensors):
    assert find_fault_of_pieces(folder, ["model"], step=7) is None
    assert find_fault_of_pieces(folder, ["model"], step=8) == "model.shard-0001-of-0002.safetensors is of step 7"
    second = folder / "model.shard-0002-of-0002.safetensors"
    write_shard(second, {"matrix": Piece(torch.zeros(5, 5), (3, 0), (8, 5))}, step=6)
    assert find_fault_of_pieces(folder, ["model"], step=7) == "model.shard-0002-of-0002.safetensors is of step 6"
    write_shard(second, {"matrix": Piece(torch.zeros(5, 5), (3, 0), (8, 5))}, step=7)
    assert "pieces of bfloat are missing" in find_fault_of_pieces(folder, ["model"], step=7)
    write_shard(second, {"matrix": Piece(torch.zeros(5, 4), (3, 0), (8, 4))}, step=7)
    assert "matrix is (8, 4) in model.shard-0002" in find_fault_of_pieces(folder, ["model"], step=7)
    second.write_bytes(b"nothing")
    assert "do not fit together" in find_fault_of_pieces(folder, ["model"], step=7)
    second.unlink()
    assert "model.shard-0002-of-0002.safetensors" in find_fault_of_pieces(folder, ["model"], step=7)


def test_a_manifest_takes_what_others_wrote_on_their_word_if_its_size_is_right(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "theirs").write_bytes(b"theirs")
    entry = describe_file(tmp_path / "theirs")
    write_manifest(tmp_path, written={"theirs": {**entry, "sha256": "of another text"}})
    assert find_fault(tmp_path) == "theirs has changed since it was written (its sha256 differs)"
    write_manifest(tmp_path, written={"theirs": entry})
    assert find_fault(tmp_path, required=["mine", "theirs"]) is None
    (tmp_path / "theirs").write_bytes(b"the")
    with pytest.raises(OSError, match="theirs, which another process wrote, is cut"):
        write_manifest(tmp_path, written={"theirs": entry})
    (tmp_path / "theirs").unlink()
    with pytest.raises(OSError, match="theirs, which another process wrote, is not to be seen here"):
        write_manifest(tmp_path, written={"theirs": entry})


def test_processes_share_the_verification_of_files_and_miss_none(tmp_path):
    for name in "abcde":
        (tmp_path / name).write_bytes(name.encode())
    write_manifest(tmp_path)
    (tmp_path / "d").write_bytes(b"x")
    faults = [find_fault(tmp_path, part=(index, 3)) for index in range(3)]
    assert faults == ["d has changed since it was written (its sha256 differs)", None, None]
