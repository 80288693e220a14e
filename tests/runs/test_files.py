import json
import math

import pytest

from hfllm.runs.files import find_non_finite, open_output_dir, replacing, sha256_of, write_json, write_text


def test_a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 1.5, "name": "naïve"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1.5, "name": "naïve"}
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.fault(6)
def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), replacing(path) as beside:
        beside.write_text("half of the n")
        raise OSError("No space left on device")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    write_text(tmp_path / "link", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "ours"


@pytest.mark.fault(11)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_holds_no_number_that_other_programs_cannot_read(tmp_path, value):
    with pytest.raises(FloatingPointError, match=r"metrics.json was not written: test.losses\[1\] is not a finite"):
        write_json(tmp_path / "metrics.json", {"step": 1, "test": {"losses": [0.5, value]}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(7)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    assert open_output_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(ValueError, match=r"output_dir .*file is a file\. Give the path of a folder"):
        open_output_dir(tmp_path / "file")
    with pytest.raises(OSError, match=r"file/out cannot be used: .* Choose another output_dir"):
        open_output_dir(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="output_dir is empty"):
        open_output_dir(" ")
    assert (tmp_path / "file").read_text() == "theirs"


def test_the_place_of_a_number_that_is_not_finite():
    assert find_non_finite({"a": [1, 2.5, None], "b": {"c": "nan"}}) == ""
    assert find_non_finite({"a": {"b": [{"c": math.nan}]}}) == "a.b[0].c"


def test_the_sha256_is_the_one_that_sha256sum_prints(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
