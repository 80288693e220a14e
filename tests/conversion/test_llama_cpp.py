"""llama.cpp itself on our GGUF files, if the npm package node-llama-cpp is installed; and the behaviour without it."""

import json
import os
import random
import shutil
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import hfllm
from hfllm.conversion.gguf import export_gguf
from hfllm.conversion.gguf_verification import verify_gguf
from hfllm.conversion.llama_cpp import LlamaCpp, ask_llama_cpp, find_llama_cpp, how_to_get
from hfllm.conversion.llama_cpp_comparison import _rounded
from hfllm.tokenization import load_tokenizer
from tests.conversion.test_gguf import LLAMA3, LLAMA3_SPLIT, YARN, changed, gpt2, llama, qwen3, split_by


gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    found = find_llama_cpp()
    if found is None:
        pytest.skip(f"llama.cpp is not at hand. {how_to_get()}")
    return found


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    library = Path(textwrap.__file__).parent
    return hfllm.train_bpe([path.read_text() for path in sorted(library.glob("[a-d]*.py"))], 1024)


MODELS = {
    "qwen3": lambda: qwen3(vocab_size=1088, tie_word_embeddings=True),
    "qwen3, a head of its own": lambda: qwen3(vocab_size=1088, rms_norm_eps=1e-2),
    "qwen3, linear": lambda: qwen3(vocab_size=1088, rope_parameters=YARN | {"rope_type": "linear"}),
    "qwen3, YaRN": lambda: qwen3(vocab_size=1088, rope_parameters=YARN),
    "llama": lambda: llama(vocab_size=1088, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, tied, no groups": lambda: llama(
        vocab_size=1088, tie_word_embeddings=True, num_key_value_heads=4, head_dim=16
    ),
    "llama, biases": lambda: llama(vocab_size=1088, attention_bias=True, mlp_bias=True),
    "llama, scaled as Llama 3": lambda: llama(vocab_size=1088, rope_parameters=LLAMA3 | {"factor": 8.0}),
    "llama, YaRN with a factor of its own": lambda: llama(
        vocab_size=1088, rope_parameters=YARN | {"attention_factor": 1.5}
    ),
    "gpt2": lambda: gpt2(vocab_size=1088),
    "gpt2, a head of its own": lambda: gpt2(vocab_size=1088, tie_word_embeddings=False, layer_norm_epsilon=1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_same_ids_conversations_and_greedy_tokens(name, llama_cpp, tokenizer, tmp_path):
    model = MODELS[name]()
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    found = verify_gguf(path, model, tokenizer).llama_cpp
    assert found.num_conversations == 2 and found.num_texts > 10 and found.num_tokens == 9 * 32
    assert found.largest_difference < (5e-3 if model.config.model_type == "gpt2" else 1e-4)  # logits of deviation 1.6
    assert not found.near_ties


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("make", [qwen3, llama, gpt2])
def test_the_rounded_dtypes_differ_by_no_more_than_their_arithmetic(make, dtype, llama_cpp, tokenizer, tmp_path):
    model = make(vocab_size=1088)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    found = verify_gguf(path, model, tokenizer).llama_cpp
    assert 0 < found.largest_difference < {"f16": 0.02, "bf16": 0.2, "q8_0": 0.5}[dtype] * found.standard_deviation
    assert len(found.near_ties) < 0.1 * found.num_tokens


@pytest.mark.slow
def test_a_gpt2_with_gpt2s_own_tokenizer(llama_cpp, book_data, tmp_path):
    tokenizer = load_tokenizer(book_data)
    model = gpt2(vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
    path = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    report = verify_gguf(path, model, tokenizer)
    assert report.llama_cpp.num_conversations == 0 and not report.llama_cpp.near_ties
    answer = ask(llama_cpp, path)
    assert (answer["bos"], answer["eos"], answer["addsBos"]) == (50256, 50256, False)


def ask(llama_cpp: LlamaCpp, path: Path, **job) -> dict:
    rest = {"threads": 1, "texts": [], "conversations": [], "runs": [], "top": 1}
    return ask_llama_cpp(llama_cpp, {"model": str(path), **rest, **job}, timeout=120)


@pytest.mark.slow
def test_a_word_that_is_a_token_is_taken_whole_only_by_llama_bpe(llama_cpp, tokenizer, tmp_path):
    """Llama 3 has such tokens, which no sequence of merges makes."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["xyzzy"] = 1024
    found = {}
    for ignore_merges in (True, False):
        other = changed(
            tokenizer,
            pre_tokenizer=split_by(LLAMA3_SPLIT),
            model={"vocab": state["model"]["vocab"], "ignore_merges": ignore_merges},
        )
        model = llama(vocab_size=1088)
        path = export_gguf(model, other, tmp_path / "model.gguf")
        verify_gguf(path, model, other)
        found[ignore_merges] = ask(llama_cpp, path, texts=["xyzzy 1234567"])["encoded"][0]
        assert found[ignore_merges] == other("xyzzy 1234567", add_special_tokens=False)["input_ids"]
    assert found[True][0] == 1024 and 1024 not in found[False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gpt-2", "llama-bpe", "smaug-bpe"])
def test_text_of_odd_characters_is_split_the_same(name, llama_cpp, tokenizer, tmp_path):
    """The vocabulary is learned without splitting, so that it has tokens across every boundary that could be missed.

    Left out is U+017F after an apostrophe, a long s that folds to s: tokenizers takes it for the contraction 's, as the
    `(?i:...)` of Qwen2's and Llama 3's patterns says, and llama.cpp does not.
    """
    characters = "abSsTtKdVvRrEeLlMm019.,;!-_'\u2019 \t\n\r\u000b\u000c\u0085\u00a0\u2003\u3000\u200b\u2028\u001c\ufeff"
    characters += "\u0301\u00e9\u00df\u03a9\u044f\u4e2d\u6587\u0627\u0905\u093f\u00bd\u00b2\u2167\u0661\U0001f600"
    characters += "\U0001f3fd\u200d\u20ac\u2122\u01c5\u02b0\u00aa\u0345\u212a\u0130\u0131"
    generator = random.Random(0)

    def odd_text() -> str:
        few = generator.sample(characters, generator.randrange(2, 9))
        return "".join(generator.choices(few, k=generator.randrange(1, 20)))

    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator((odd_text() for _ in range(20_000)), trainer)
    texts = [odd_text() for _ in range(3000)]
    unsplit = [backend.encode(text).ids for text in texts]
    if name == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = LLAMA3_SPLIT if name != "qwen2" else LLAMA3_SPLIT.replace("{1,3}", "")
        backend = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "pre_tokenizer": split_by(pattern)}))
    odd = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ours = [odd(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sum(a != b for a, b in zip(ours, unsplit)) > 1000  # splitting matters

    path = export_gguf(llama(vocab_size=4000), odd, tmp_path / "model.gguf")
    theirs = ask(llama_cpp, path, texts=texts)["encoded"]
    assert [text for text, a, b in zip(texts, ours, theirs) if a != b] == []


@pytest.mark.slow
@pytest.mark.parametrize("change", ["rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling"])
def test_llama_cpp_notices_a_wrong_key(change, llama_cpp, tokenizer, tmp_path, monkeypatch):
    """Keys that transformers does not read, or that it is kept from comparing here."""
    right = llama(vocab_size=1088, rope_parameters=YARN)
    wrong = {
        "rope.freq_base": lambda: llama(vocab_size=1088, rope_parameters=YARN | {"rope_theta": 9000.0}),
        "attention.layer_norm_rms_epsilon": lambda: llama(vocab_size=1088, rope_parameters=YARN, rms_norm_eps=1e-2),
        "rope.scaling": lambda: llama(vocab_size=1088),
    }[change]()
    wrong.load_state_dict(right.state_dict())
    monkeypatch.setattr("hfllm.conversion.gguf_verification._check_config", lambda path, model: None)
    path = export_gguf(wrong, tokenizer, tmp_path / "model.gguf")
    verify_gguf(path, wrong, tokenizer)
    with pytest.raises(RuntimeError, match=r"llama\.cpp computes something else"):
        verify_gguf(path, right, tokenizer)


@pytest.mark.slow
def test_a_file_that_llama_cpp_refuses_is_reported_in_its_words(llama_cpp, tokenizer, tmp_path):
    path = export_gguf(qwen3(vocab_size=1088), tokenizer, tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(RuntimeError, match=r"llama\.cpp failed on .*exit status 1(?s:.*)not within the file bounds"):
        ask(llama_cpp, path)


# Without it


def test_llama_cpp_is_looked_for_where_it_was_said_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("HFLLM_NODE_MODULES", raising=False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/node")
    assert find_llama_cpp() is None
    with pytest.raises(ValueError, match=r"no node-llama-cpp in .*elsewhere.*npm install --prefix"):
        find_llama_cpp(tmp_path / "elsewhere")
    monkeypatch.setenv("HFLLM_NODE_MODULES", str(tmp_path / "variable"))
    with pytest.raises(ValueError, match="variable"):
        find_llama_cpp()

    package = tmp_path / "llama.cpp" / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    monkeypatch.delenv("HFLLM_NODE_MODULES")
    assert find_llama_cpp() == LlamaCpp("/usr/bin/node", package.resolve())
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_llama_cpp() is None
    with pytest.raises(ValueError, match="no program node"):
        find_llama_cpp(package.parent)


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    script, child_file = tmp_path / "node", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {child_file}\nwait\n")
    script.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="did not answer within 1 s"):
        ask_llama_cpp(LlamaCpp(str(script), tmp_path), {"model": "model.gguf"}, timeout=1)
    assert time.monotonic() - start < 30  # and not when the child had slept its fill
    child = int(child_file.read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process_id: int) -> bool:
    """False also for a process that has ended and waits for its parent to notice."""
    try:
        os.kill(process_id, 0)
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_crash_is_reported_with_its_last_words(tmp_path):
    script = tmp_path / "node"
    script.write_text("#!/bin/sh\necho 'unknown model architecture' >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"failed on model\.gguf \(exit status 3\):\nunknown model architecture"):
        ask_llama_cpp(LlamaCpp(str(script), tmp_path), {"model": "model.gguf"}, timeout=10)


def test_rounding_as_llama_cpp_does_it():
    values = torch.randn(3, 96) * torch.tensor([[1e-3], [1.0], [100.0]])
    kinds = gguf.GGMLQuantizationType
    for dtype, kind in (("f16", kinds.F16), ("bf16", kinds.BF16), ("q8_0", kinds.Q8_0)):
        expected = gguf.dequantize(gguf.quantize(values.numpy(), kind), kind)
        torch.testing.assert_close(_rounded(values, dtype), torch.tensor(expected).view(3, 96), rtol=0, atol=0)
    torch.testing.assert_close(_rounded(values[:, :40], "q8_0"), values[:, :40].half().float())  # no whole blocks
