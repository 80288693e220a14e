import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hfllm
from hfllm.cli.arguments import parse_arguments
from hfllm.cli.opening import open_causal_lm
from hfllm.conversion import to_native
from hfllm.hub import PushError
from hfllm.hub.contents import check_model_folder
from hfllm.runs.lock import run_lock
from hfllm.training.checkpoint import save_checkpoint
from tests.conftest import make_tiny_config
from tests.conversion.test_native import with_random_weights
from tests.cutting import cut
from tests.recipes.conftest import load_recipe


recipe = load_recipe("export")


@pytest.fixture
def export(capsys):
    """Run recipes/export.py on command-line options; returns what it printed."""

    def run(**options) -> str:
        capsys.readouterr()
        argv = [f"--{name}={value}" for name, value in options.items()]
        recipe.main(parse_arguments(recipe.ExportArguments, argv))
        return capsys.readouterr().out

    return run


CONFIGS = {
    "qwen3": ("modern", {"num_key_value_heads": 2}),
    "llama": ("modern", {"use_qk_norm": False, "tie_word_embeddings": False}),
    "gpt2": ("book", {"attention_bias": False, "attention_output_bias": True}),
}


@pytest.fixture
def make_model(tokenizer_folder, tmp_path):
    """A folder as a run of pretraining leaves it, with random weights."""

    def make(
        native_type: str = "qwen3", dtype: torch.dtype = torch.float32, folder: str = "model", **overrides
    ) -> Path:
        preset, fields = CONFIGS[native_type]
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        config = make_tiny_config(preset, **{"vocab_size": len(tokenizer), **fields, **overrides})
        model = with_random_weights(hfllm.GPTForCausalLM(config)).to(dtype)
        model.generation_config.eos_token_id = [1, 4]  # as after instruction tuning
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return make


def hard_ids(tokenizer) -> list[list[int]]:
    chat = [{"role": "user", "content": "Cafe\u0301 <|im_end|>\r\n"}, {"role": "assistant", "content": "12 \U0001f600"}]
    texts = [" Cafe\u0301 Caf\u00e9\r\n\r\n 1234  x", "<|im_start|>user\n\U0001f469\u200d\U0001f467<|im_end|>\n"]
    return [
        *(tokenizer(text).input_ids for text in texts),
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"],
    ]


@pytest.mark.parametrize("native_type", CONFIGS)
def test_the_native_folder_opens_by_itself_with_the_same_logits_and_tokenizer(
    export, make_model, native_type, tmp_path
):
    source = make_model(native_type)
    printed = export(model=source, to=native_type, output_dir=tmp_path / "out")
    assert "the same likeliest token at 100.00%" in printed
    assert "greedy: the same 16 tokens after 5 prompts" in printed

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == native_type
    ours, native = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    ids = torch.arange(30)[None]
    torch.testing.assert_close(native(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    assert native.generation_config.eos_token_id == [1, 4]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert hard_ids(tokenizers[0]) == hard_ids(tokenizers[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run.json"),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_native_model_becomes_ours_and_the_way_back_gives_the_same_weights(export, make_model, tmp_path):
    source = make_model("gpt2")
    for model, to, folder in ((source, "gpt2", "native"), (tmp_path / "native", "hfllm", "ours")):
        export(model=model, to=to, output_dir=tmp_path / folder)
    export(model=tmp_path / "ours", to="gpt2", output_dir=tmp_path / "again")
    native, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("native", "again"))
    assert native.keys() == again.keys()
    assert all(torch.equal(native[name], again[name]) for name in native)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "hfllm_gpt" and "AutoModelForCausalLM" in config["auto_map"]


@pytest.fixture
def in_pieces(make_model, tmp_path):
    """A checkpoint that a run of three processes would leave, and the model in it."""
    source = make_model()
    model = hfllm.GPTForCausalLM.from_pretrained(source)
    parts = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "accelerator": Accelerator(cpu=True)}
    parts["tokenizer"] = AutoTokenizer.from_pretrained(source)
    return cut(save_checkpoint(tmp_path / "run" / "checkpoints", state={"step": 5}, **parts), 3), model


def test_a_checkpoint_in_pieces_becomes_one_folder_that_opens(export, in_pieces, tmp_path):
    checkpoint, model = in_pieces
    printed = export(model=checkpoint, to="whole", output_dir=tmp_path / "out")
    assert "tensors read back are the same as their pieces" in printed
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert opened.generation_config.eos_token_id == [1, 4]
    assert not list((tmp_path / "out").glob("*.shard-*")) and not (tmp_path / "out" / "state.json").exists()
    assert "nothing to do" in export(model=checkpoint, to="whole", output_dir=tmp_path / "out")
    export(model=tmp_path / "out", to="qwen3", output_dir=tmp_path / "native")


@pytest.mark.fault(4)
def test_a_damaged_piece_is_not_exported(export, in_pieces, tmp_path):
    checkpoint, _ = in_pieces
    file = checkpoint / "model.shard-0002-of-0003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.shard-0002-of-0003\.safetensors has changed since it was written"):
        export(model=checkpoint, to="whole", output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_what_cannot_be_done_with_pieces_says_how_they_become_whole(export, in_pieces, make_model, tmp_path):
    checkpoint, _ = in_pieces
    out = {"output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"is in pieces.* Make it whole first, by --to whole"):
        export(model=checkpoint, to="qwen3", **out)
    with pytest.raises(ValueError, match="is not in pieces"):
        export(model=make_model(folder="other"), to="whole", **out)
    with pytest.raises(ValueError, match="--to whole leaves the weights as they are"):
        export(model=checkpoint, to="whole", dtype="bfloat16", **out)
    for refuse in (open_causal_lm, check_model_folder):
        with pytest.raises((ValueError, PushError), match=r"in pieces.*recipes/export.py --model .*--to whole"):
            refuse(checkpoint)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_reported_and_the_written_weights_are_the_rounded_ones(export, make_model, dtype, tmp_path):
    source = make_model()
    printed = export(model=source, to="qwen3", dtype=dtype, output_dir=tmp_path / "out")
    assert f"rounding to {dtype}: largest |difference| " in printed
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    expected = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))


def test_a_model_in_bfloat16_stays_in_it_and_nothing_is_rounded(export, make_model, tmp_path):
    printed = export(model=make_model(dtype=torch.bfloat16), to="qwen3", output_dir=tmp_path / "out")
    assert "parameters in bfloat16" in printed and "rounding" not in printed
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def run_without_hfllm(program: str, folder: Path) -> str:
    program = f"""
import sys, torch
sys.modules["hfllm"] = None  # importing it is an error, as if it were not installed
torch.set_num_threads(1)
{program}
"""
    environment = {"HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_native_folder_opens_where_hfllm_is_not_installed(export, make_model, tmp_path):
    source = make_model()
    export(model=source, to="qwen3", output_dir=tmp_path / "out")
    torch.save(AutoModelForCausalLM.from_pretrained(source)(torch.arange(30)[None]).logits, tmp_path / "expected.pt")
    printed = run_without_hfllm(
        """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out")
torch.testing.assert_close(model(torch.arange(30)[None]).logits, torch.load("expected.pt"), atol=1e-5, rtol=0)
print(type(model).__name__, AutoTokenizer.from_pretrained("out")("Cafe\\u0301").input_ids)
""",
        tmp_path,
    )
    expected = AutoTokenizer.from_pretrained(source)("Cafe\u0301").input_ids
    assert printed.strip() == f"Qwen3ForCausalLM {expected}"


@pytest.mark.slow
def test_the_command_it_prints_runs_where_hfllm_is_not_installed(export, make_model, tmp_path):
    printed = export(model=make_model("gpt2"), to="gpt2", output_dir=tmp_path / "out")
    [command] = [line.strip() for line in printed.splitlines() if line.strip().startswith("python -c")]
    assert "'generated_text': 'Every effort moves you" in run_without_hfllm(shlex.split(command)[2], tmp_path)


# What goes wrong leaves nothing behind


def test_an_export_with_another_weight_is_not_called_done(export, make_model, tmp_path, monkeypatch):
    def almost(model, native_type):
        twin = to_native(model, native_type)
        with torch.no_grad():
            twin.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
        return twin

    monkeypatch.setattr(recipe, "to_native", almost)
    with pytest.raises(RuntimeError, match=r"The logits differ by more than .*Nothing was exported"):
        export(model=make_model(), to="qwen3", output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_writes_otherwise_is_not_called_done(make_model, tokenizer_folder, monkeypatch):
    """With the same logits but a broken cache, say."""
    model = AutoModelForCausalLM.from_pretrained(make_model())
    prompts = [torch.tensor([[5, 6, 7]])]
    recipe.check_same_model(model, model, prompts)
    greedy = [(torch.tensor([[1, 2, 3]]), torch.tensor([[1.0, 1e-9, 1.0]])), (torch.tensor([[1, 4, 5]]), None)]
    answers = iter(greedy)
    monkeypatch.setattr(recipe.comparison, "greedy_tokens", lambda *args: next(answers))
    recipe.check_same_model(model, model, prompts)  # the texts part at two tokens that are equally likely
    answers = iter([(greedy[0][0], torch.ones(1, 3)), greedy[1]])
    with pytest.raises(RuntimeError, match=r"After \[\[5, 6, 7\]\] the original writes \[1, 2, 3\], and the export"):
        recipe.check_same_model(model, model, prompts)


def test_a_tokenizer_that_would_read_otherwise_is_not_called_done(export, make_model, tmp_path, monkeypatch):
    def as_qwen(model, tokenizer, folder):
        recipe_save(model, tokenizer, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"}))

    recipe_save = recipe.save_model
    monkeypatch.setattr(recipe, "save_model", as_qwen)
    with pytest.raises(RuntimeError, match="differs from the one written:\n  - ids of 'Caf"):
        export(model=make_model(), to="qwen3", output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_config_without_a_twin_says_which_field_and_what_to_do(export, make_model, tmp_path):
    source = make_model(final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0.*config_overrides: final_logit_softcapping"):
        export(model=source, to="qwen3", output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="position_embedding_type='rotary', but gpt2 has a table"):
        export(model=source, to="gpt2", output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_earlier_export_is_replaced_only_when_asked(export, make_model, tmp_path):
    source, out = make_model(), tmp_path / "out"
    assert "Done" in export(model=source, to="qwen3", output_dir=out)
    with pytest.raises(ValueError, match=r"belongs to another run:\n    dtype was 'float32' and is 'bfloat16'"):
        export(model=source, to="qwen3", dtype="bfloat16", output_dir=out)
    (out / "thesis.docx").write_text("years of work")
    export(model=source, to="qwen3", dtype="bfloat16", output_dir=out, overwrite_output_dir=True)
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    assert (out / "thesis.docx").exists()


@pytest.mark.fault(20)
def test_the_same_export_again_has_nothing_to_do_unless_its_model_or_itself_changed(export, make_model, tmp_path):
    source, out = make_model(), tmp_path / "out"
    export(model=source, to="qwen3", output_dir=out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in export(model=source, to="qwen3", output_dir=out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    (out / "model.safetensors").unlink()
    assert "nothing to do" not in export(model=source, to="qwen3", output_dir=out)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model_sha256 was"):
        export(model=source, to="qwen3", output_dir=out)


@pytest.mark.fault(24, 32)
def test_an_export_that_fails_leaves_the_earlier_one(export, make_model, tmp_path, monkeypatch):
    source, out = make_model(), tmp_path / "out"
    export(model=source, to="qwen3", output_dir=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(recipe, "check_same_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model=source, to="qwen3", dtype="bfloat16", output_dir=out, overwrite_output_dir=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.fault(32)
def test_somebody_elses_model_is_never_replaced(export, make_model, tmp_path):
    source, theirs = make_model(), make_model(folder="theirs")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="a model that no run of this recipe made"):
            export(model=source, to="qwen3", output_dir=theirs, overwrite_output_dir=overwrite)


@pytest.mark.fault(33)
def test_two_exports_into_one_folder_at_once_are_refused(export, make_model, tmp_path):
    source, out = make_model(), tmp_path / "out"
    with run_lock(out), pytest.raises(RuntimeError, match="Another run is using"):
        export(model=source, to="qwen3", output_dir=out)


def test_the_model_itself_is_never_overwritten(export, make_model, tmp_path):
    source = make_model()
    for target in (source, tmp_path):
        with pytest.raises(ValueError, match="is the model's own folder"):
            export(model=source, to="qwen3", output_dir=target, overwrite_output_dir=True)
    assert (source / "model.safetensors").exists()


def test_options_that_do_not_go_together_are_refused(export, make_model, tmp_path):
    for options, words in (
        ({"to": "qwen3", "dtype": "q8_0"}, "--dtype q8_0 is for --to gguf"),
        ({"to": "onnx", "dtype": "bfloat16"}, "an ONNX file is in float32"),
        ({"to": "hfllm"}, "is an hfllm model already. It can be exported to gpt2, llama, qwen3, gguf or onnx"),
    ):
        with pytest.raises(ValueError, match=words):
            export(model=make_model(), output_dir=tmp_path / "out", **options)
    export(model=make_model(), to="qwen3", output_dir=tmp_path / "native")
    with pytest.raises(ValueError, match=r"is a native qwen3 already\. Export it to hfllm"):
        export(model=tmp_path / "native", to="llama", output_dir=tmp_path / "out")


def test_an_adapter_is_merged_into_the_base_that_it_names(export, make_model, tmp_path):
    source = make_model()
    adapted = get_peft_model(
        hfllm.GPTForCausalLM.from_pretrained(source), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    export(model=tmp_path / "adapter", tokenizer=source, to="qwen3", output_dir=tmp_path / "out")
    exported, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(30)[None]
    torch.testing.assert_close(exported(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=0)


def test_a_folder_without_a_model_is_refused(export, make_model, tmp_path):
    source = make_model()
    model = hfllm.GPTForCausalLM.from_pretrained(source)
    model.name_or_path = ""
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    classifier = hfllm.GPTForSequenceClassification(make_tiny_config("modern"))
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("adapter", "a LoRA adapter that does not name its base"),
        ("classifier", "is a GPTForSequenceClassification; only causal language models"),
        ("empty", "a folder without a config.json"),
        ("missing", "is not a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            export(model=tmp_path / name, to="qwen3", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_must_be_there_and_be_the_models(export, make_model, tokenizer_folder, tmp_path):
    source = make_model(vocab_size=100)
    with pytest.raises(ValueError, match=r"The tokenizer has \d+ ids, but the model's vocab_size is 100"):
        export(model=source, to="qwen3", output_dir=tmp_path / "out")
    source = make_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(ValueError, match=r"No tokenizer in .*Give its folder or Hub id as --tokenizer"):
        export(model=source, to="qwen3", output_dir=tmp_path / "out")
    export(model=source, to="qwen3", tokenizer=tokenizer_folder, output_dir=tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert hard_ids(AutoTokenizer.from_pretrained(tmp_path / "out")) == hard_ids(expected)


def test_weights_that_a_dtype_cannot_hold_or_that_are_not_numbers_are_named(export, make_model, tmp_path):
    source = make_model()
    model = hfllm.GPTForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 70_000.0
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has weights up to 70,000.*65,504"):
        export(model=source, to="qwen3", dtype="float16", output_dir=tmp_path / "out")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds numbers that are not finite"):
        export(model=source, to="qwen3", output_dir=tmp_path / "out")


# Other formats


@pytest.mark.parametrize(("to", "package"), [("gguf", "gguf"), ("onnx", "onnx")])
def test_a_missing_package_is_named_with_what_brings_it(export, make_model, to, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=r"pip install -e '.\[export\]'"):
        export(model=make_model(), to=to, output_dir=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("native_type", CONFIGS)
def test_ours_becomes_a_gguf_file(export, make_model, native_type, tmp_path):
    pytest.importorskip("gguf")
    printed = export(model=make_model(native_type), to="gguf", dtype="float16", output_dir=tmp_path / "out")
    [file] = (tmp_path / "out").glob("*.gguf")
    assert file.name == "model-f16.gguf"
    assert f"llama-cli -m {file}" in printed
    assert "model-f16.gguf: f16" in printed and "every tensor read back" in printed


@pytest.mark.slow
def test_ours_becomes_an_onnx_file_and_the_printed_command_runs_it(export, make_model, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    source = make_model()
    printed = export(model=source, to="onnx", output_dir=tmp_path / "out")
    [command] = [line.strip() for line in printed.splitlines() if line.strip().startswith("python -c")]
    finished = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "array" in finished.stdout
    expected = AutoTokenizer.from_pretrained(source)
    assert hard_ids(AutoTokenizer.from_pretrained(tmp_path / "out")) == hard_ids(expected)


@pytest.mark.slow
def test_a_native_model_goes_straight_to_gguf_and_onnx(export, make_model, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("onnxruntime")
    export(model=make_model("llama"), to="llama", output_dir=tmp_path / "native")
    export(model=tmp_path / "native", to="gguf", output_dir=tmp_path / "gguf")
    export(model=tmp_path / "native", to="onnx", output_dir=tmp_path / "onnx")
    assert (tmp_path / "gguf" / "native-f32.gguf").exists() and (tmp_path / "onnx" / "model.onnx").exists()
