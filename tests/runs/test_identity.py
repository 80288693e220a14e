import json
from pathlib import Path

import pytest

from hfllm.runs.identity import check_same_run, find_differences, hash_model, hash_rows, identify
from tests.conftest import make_tiny_config


@pytest.mark.fault(19)
def test_a_refusal_shows_each_difference_and_names_the_ways():
    saved = {"learning_rate": 0.02, "seed": 1, "train_sha256": "a" * 64}
    check_same_run(saved, dict(saved), "out/run")
    with pytest.raises(ValueError) as error:
        current = {"learning_rate": 0.01, "seed": 1, "train_sha256": "b" * 64}
        check_same_run(saved, current, "out/run", fork_from="out/run/checkpoints/step-00000100")
    assert str(error.value).splitlines()[:3] == [
        "out/run belongs to another run:",
        "    learning_rate was 0.02 and is 0.01",
        f"    train_sha256 was {'a' * 16}... and is {'b' * 16}...",
    ]
    assert "model=out/run/checkpoints/step-00000100 and another output_dir" in str(error.value)
    assert "overwrite_output_dir" in str(error.value)


def test_what_one_side_lacks_differs_and_equal_values_do_not():
    assert find_differences({"a": 1, "b": [1, 2]}, {"b": [1, 2], "c": "x"}) == [
        "a was 1 and is None",
        "c was None and is 'x'",
    ]


def test_an_identity_is_what_comes_back_from_json():
    identity = identify(make_tiny_config("modern"), betas=(0.9, 0.95), dataset=Path("a/b"), limit=float("inf"))
    assert identity == json.loads(json.dumps(identity, allow_nan=False))
    assert identity["betas"] == [0.9, 0.95] and identity["dataset"] == "a/b"
    assert identity["model.hidden_size"] == 32 and "model.transformers_version" not in identity


def test_rows_hash_by_content_and_order():
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert hash_rows(rows) == hash_rows([{"label": 0, "text": "a"}, {"label": 1, "text": "b"}])
    others = [rows[::-1], rows[:1], [{"text": "a", "label": 1}, rows[1]], [*rows, rows[0]]]
    assert len({hash_rows(each) for each in [rows, *others]}) == 5
    assert hash_rows([{"text": "\ud800"}]) != hash_rows([{"text": "?"}])  # half a surrogate


def make_model(folder: Path, weights: bytes = b"weights", **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.fault(26)
def test_a_model_is_its_config_and_the_bytes_of_its_weights(tmp_path):
    one = make_model(tmp_path / "one")
    (one / "README.md").write_text("a card")
    same = make_model(tmp_path / "same", transformers_version="9", auto_map={"AutoModel": "x"})
    assert hash_model(one) == hash_model(same)
    trained = make_model(tmp_path / "trained", b"weightz")
    wider = make_model(tmp_path / "wider", hidden_size=9)
    assert len({hash_model(each) for each in (one, trained, wider)}) == 3


@pytest.mark.fault(26)
def test_an_adapter_is_its_weights_and_those_of_its_base(tmp_path):
    base, adapter = make_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"lora")
    hashes = [hash_model(adapter)]
    (adapter / "optimizer.safetensors").write_bytes(b"of a checkpoint")
    assert hash_model(adapter) == hashes[0]
    (adapter / "adapter_model.safetensors").write_bytes(b"more")
    hashes.append(hash_model(adapter))
    (base / "model.safetensors").write_bytes(b"trained further")
    assert len({*hashes, hash_model(adapter)}) == 3


def test_a_model_of_the_hub_is_its_revision():
    assert hash_model("owner/name", revision="0123abc") == "0123abc"
