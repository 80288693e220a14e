import hashlib
import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfllm
from hfllm.hub import PushError, push_to_hub


def uploads(hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT ")]


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_pushed_model_is_the_one_that_comes_back(hub, run_folder):
    address = push_to_hub(run_folder, "me/my-gpt")
    assert address.startswith(f"{hub.url}/me/my-gpt/commit/")
    model = AutoModelForCausalLM.from_pretrained("me/my-gpt")
    assert type(model) is hfllm.GPTForCausalLM
    assert same_weights(model, hfllm.GPTForCausalLM.from_pretrained(run_folder))
    assert AutoTokenizer.from_pretrained("me/my-gpt").chat_template
    assert hub.num_commits("me/my-gpt") == 2  # the repository's first one, and ours: whole or not at all


def test_what_travels_is_the_model_its_code_its_card_and_nothing_of_this_machine(hub, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    files = hub.files("me/my-gpt")
    assert set(files) == {
        *(".gitattributes", "README.md", "chat_template.jinja", "config.json", "configuration_gpt.py", "curves.png"),
        *("environment.json", "generation_config.json", "metrics.json", "model.safetensors", "modeling_gpt.py"),
        *("report.html", "tokenizer.json", "tokenizer_config.json"),
        *("documents_gpt.py", "generation_gpt.py", "kernels_gpt.py", "loading_gpt.py"),
    }
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    for name, content in files.items():
        if name.endswith((".safetensors", ".png")):
            continue
        for private in ("/home/somebody", str(run_folder), "cache_dir", "hf_"):
            assert private not in content.decode().replace("hf_hub", ""), (name, private)
    assert json.loads(files["metrics.json"])["dataset"] == "animals.txt"


def test_a_token_that_looks_like_a_path_stays_a_token(hub, make_run):
    folder = make_run(seed=6)
    path = folder / "tokenizer_config.json"
    added = {"tokenizer_file": "/home/somebody/tokenizer.json", "extra_special_tokens": ["/INST"], "is_local": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    push_to_hub(folder, "me/my-gpt")
    there = json.loads(hub.files("me/my-gpt")["tokenizer_config.json"])
    assert there["extra_special_tokens"] == ["/INST"]
    assert "tokenizer_file" not in there and "is_local" not in there


def test_a_push_of_what_is_there_sends_nothing_and_makes_no_commit(hub, run_folder):
    first = push_to_hub(run_folder, "me/my-gpt")
    assert len(uploads(hub)) == 2  # weights and picture; text travels in the commit
    hub.requests.clear()
    assert push_to_hub(run_folder, "me/my-gpt") == first
    assert uploads(hub) == [] and hub.num_commits("me/my-gpt") == 2
    assert not any("/commit/" in request for request in hub.requests)


def test_only_what_changed_is_sent(hub, make_run, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    trained_on = make_run(seed=1)  # the same model with other weights
    shutil.copyfile(run_folder / "curves.png", trained_on / "curves.png")
    hub.requests.clear()
    push_to_hub(trained_on, "me/my-gpt")
    digest = hashlib.sha256((trained_on / "model.safetensors").read_bytes()).hexdigest()
    assert uploads(hub) == [f"PUT /lfs/{digest}"]
    assert hub.files("me/my-gpt")["model.safetensors"] == (trained_on / "model.safetensors").read_bytes()


def test_a_revision_is_a_branch_that_leaves_main_alone(hub, make_run, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    other = make_run(seed=1)
    push_to_hub(other, "me/my-gpt", revision="longer")
    main, longer = (hfllm.GPTForCausalLM.from_pretrained("me/my-gpt", revision=name) for name in ("main", "longer"))
    assert same_weights(main, hfllm.GPTForCausalLM.from_pretrained(run_folder))
    assert same_weights(longer, hfllm.GPTForCausalLM.from_pretrained(other))


def test_weights_in_shards_give_way_to_a_single_file(hub, run_folder, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(run_folder, sharded)
    (sharded / "model.safetensors").unlink()
    hfllm.GPTForCausalLM.from_pretrained(run_folder).save_pretrained(sharded, max_shard_size="40KB")
    push_to_hub(sharded, "me/my-gpt")
    assert "model.safetensors.index.json" in hub.files("me/my-gpt")
    push_to_hub(run_folder, "me/my-gpt")
    assert [name for name in hub.files("me/my-gpt") if "safetensors" in name] == ["model.safetensors"]


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/api/repos/create", {"status": 503, "message": "Service Unavailable"}),
        ("POST", "/commit/", {"status": 503, "message": "Service Unavailable"}),
        ("POST", "/preupload/", {"status": 500, "message": "Internal Error"}),
        ("POST", "/lfs/objects/batch", {"status": 502, "message": "Bad Gateway"}),
        ("PUT", "/lfs/", {}),  # the connection drops in the middle of the weights
        ("POST", "/commit/", {}),
        ("POST", "/commit/", {"is_after": True}),  # committed, but the answer is lost
    ],
)
def test_a_bad_moment_of_the_hub_is_survived(hub, run_folder, method, path, fault):
    hub.fail(method, path, **fault)
    push_to_hub(run_folder, "me/my-gpt")
    assert hub.num_commits("me/my-gpt") == 2  # never a second one of the same
    assert same_weights(
        hfllm.GPTForCausalLM.from_pretrained("me/my-gpt"), hfllm.GPTForCausalLM.from_pretrained(run_folder)
    )


@pytest.mark.fault(22)
def test_a_download_that_breaks_off_is_tried_again(hub, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    hub.fail("GET", "/model.safetensors", times=2)
    pulled = hfllm.GPTForCausalLM.from_pretrained("me/my-gpt")
    assert same_weights(pulled, hfllm.GPTForCausalLM.from_pretrained(run_folder))
    assert sum(r.startswith("GET ") and r.endswith("/model.safetensors") for r in hub.requests) == 3


@pytest.mark.fault(22)
def test_a_hub_that_stays_down_is_an_error_and_the_same_push_can_be_repeated(hub, run_folder):
    hub.fail("POST", "/commit/", status=503, message="Service Unavailable", times=99)
    with pytest.raises(PushError, match=r"The Hub answered 503 .*run the same push again") as raised:
        push_to_hub(run_folder, "me/my-gpt")
    assert not raised.value.is_refusal
    assert set(hub.files("me/my-gpt")) == {".gitattributes"}
    hub.faults.clear()
    hub.requests.clear()
    push_to_hub(run_folder, "me/my-gpt")
    assert uploads(hub) == []  # what had arrived was kept
    assert "model.safetensors" in hub.files("me/my-gpt")


def test_a_commit_of_somebody_else_in_the_meantime_is_kept(hub, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    hub.fail("POST", "/commit/", hook=lambda: hub.commit("me/my-gpt", {"notes.md": b"theirs"}, "meanwhile"))
    hub.commit("me/my-gpt", {"model.safetensors": b"old"}, "something to change")
    hub.requests.clear()
    push_to_hub(run_folder, "me/my-gpt")
    assert sum("/commit/" in request for request in hub.requests) == 2  # the first is refused: the parent has moved
    files = hub.files("me/my-gpt")
    assert files["notes.md"] == b"theirs"
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()


def test_another_model_that_comes_in_the_meantime_is_not_written_over(hub, make_run, run_folder):
    theirs = json.dumps({"model_type": "llama", "hidden_size": 99}).encode()
    hub.fail("POST", "/commit/", hook=lambda: hub.commit("me/my-gpt", {"config.json": theirs}, "meanwhile"))
    with pytest.raises(PushError, match="holds another model"):
        push_to_hub(run_folder, "me/my-gpt")
    assert hub.files("me/my-gpt")["config.json"] == theirs


def test_missing_permission_is_explained(hub, run_folder, monkeypatch):
    with pytest.raises(PushError, match=r"may not write to google/my-gpt.*--repo_id of your own"):
        push_to_hub(run_folder, "google/my-gpt")
    hub.create("you/theirs")
    with pytest.raises(PushError, match="may not write to you/theirs"):
        push_to_hub(run_folder, "you/theirs")
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    with pytest.raises(PushError, match="does not know this token"):
        push_to_hub(run_folder, "me/my-gpt")


def test_a_missing_token_is_an_error_before_any_request(hub, run_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=r"no token.*hf auth login"):
        push_to_hub(run_folder, "me/my-gpt")
    assert hub.requests == []


@pytest.mark.parametrize("refuses_each", [False, True])
def test_a_full_quota_is_explained(hub, run_folder, refuses_each):
    hub.quota, hub.refuses_each = 1000, refuses_each
    with pytest.raises(PushError, match=r"no room left for me/my-gpt: .*Private repository storage limit reached"):
        push_to_hub(run_folder, "me/my-gpt")
    assert set(hub.files("me/my-gpt")) == {".gitattributes"}


@pytest.mark.parametrize("repo_id", ["me/my gpt", "a/b/c", "", "-x/y", "https://example.org/me/x"])
def test_an_id_that_is_none_is_refused(hub, run_folder, repo_id):
    with pytest.raises(PushError, match="is not an id of the Hub"):
        push_to_hub(run_folder, repo_id)
    assert hub.requests == []


def test_a_name_without_an_owner_is_the_users(hub, run_folder):
    push_to_hub(run_folder, "my-gpt")
    assert "me/my-gpt" in hub.repositories


def test_a_folder_that_is_not_a_model_is_refused(hub, run_folder, tmp_path):
    with pytest.raises(PushError, match="is not a folder"):
        push_to_hub(tmp_path / "nowhere", "me/my-gpt")
    with pytest.raises(PushError, match=r"no config.json; it holds nothing"):
        push_to_hub(tmp_path, "me/my-gpt")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(PushError, match="The run is not over"):
        push_to_hub(tmp_path, "me/my-gpt")
    shutil.copyfile(run_folder / "config.json", tmp_path / "config.json")
    with pytest.raises(PushError, match="no weights"):
        push_to_hub(tmp_path, "me/my-gpt")
    assert hub.requests == []


def test_a_repository_with_another_model_is_left_alone_unless_told(hub, make_run, run_folder):
    push_to_hub(run_folder, "me/my-gpt")
    hub.commit("me/my-gpt", {"LICENSE": b"theirs", "extra.bin": b"x"}, "more")
    wider = make_run(hidden_size=64)
    with pytest.raises(PushError, match=r"another model: .*hidden_size is 32, here 64.*--overwrite"):
        push_to_hub(wider, "me/my-gpt")
    push_to_hub(wider, "me/my-gpt", overwrite=True)
    assert hfllm.GPTForCausalLM.from_pretrained("me/my-gpt").config.hidden_size == 64
    assert "extra.bin" not in hub.files("me/my-gpt") and hub.files("me/my-gpt")["LICENSE"] == b"theirs"


def test_a_private_repository_is_refused_to_others_with_the_next_step(hub, run_folder, monkeypatch):
    push_to_hub(run_folder, "me/secret", private=True)
    assert hub.repositories["me/secret"].is_private
    assert hfllm.GPTForCausalLM.from_pretrained("me/secret").num_parameters() > 0
    shutil.rmtree(hub_cache())
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="hf auth login"):
        AutoModelForCausalLM.from_pretrained("me/secret")


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_a_public_repository_does_not_take_what_was_to_be_private(hub, run_folder):
    hub.create("me/open")
    with pytest.raises(PushError, match=r"me/open exists already, and is public"):
        push_to_hub(run_folder, "me/open", private=True)
    assert set(hub.files("me/open")) == {".gitattributes"}


def test_a_token_is_never_told_or_sent(hub, make_run, monkeypatch, caplog, capsys):
    token = hub.token("me")
    folder = make_run(seed=2)
    (folder / "samples.txt").write_text(f"--- step 3\nlogin({token!r})\n")
    with caplog.at_level(logging.DEBUG), pytest.raises(PushError, match="holds what looks like a token") as raised:
        push_to_hub(folder, "me/my-gpt")
    (folder / "samples.txt").unlink()
    hub.fail("POST", "/commit/", status=403, message="Forbidden", times=9)
    with caplog.at_level(logging.DEBUG), pytest.raises(PushError) as refused:
        push_to_hub(folder, "me/my-gpt")
    shown = capsys.readouterr()
    told = [str(raised.value), str(refused.value), caplog.text, shown.out, shown.err]
    told += [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert not any(token in text for text in told)


def test_the_card_on_the_hub_keeps_what_a_person_wrote_there(hub, make_run):
    folder = make_run(seed=3)
    push_to_hub(folder, "me/my-gpt")
    card = ModelCard(hub.files("me/my-gpt")["README.md"].decode())
    card.data.license = "apache-2.0"
    card.text += "\n## My own words\n\nTrained on a rainy day.\n"
    hub.commit("me/my-gpt", {"README.md": str(card).encode()}, "by hand")
    metrics = json.loads((folder / "metrics.json").read_text()) | {"eval_bits_per_byte": 1.125}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    push_to_hub(folder, "me/my-gpt")
    card = ModelCard(hub.files("me/my-gpt")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "Trained on a rainy day." in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["bits_per_byte"] == 1.125
