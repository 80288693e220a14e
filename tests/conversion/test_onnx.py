import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    TorchAoConfig,
)

import hfllm
from hfllm.conversion import onnx as conversion
from hfllm.conversion.onnx import export_onnx, verify_onnx
from tests.conftest import make_tiny_config


onnx = pytest.importorskip("onnx", reason="from the extra 'export'")
pytest.importorskip("onnxscript", reason="from the extra 'export'")
onnxruntime = pytest.importorskip("onnxruntime", reason="from the extra 'export'")


def make_model(preset: str, **overrides) -> hfllm.GPTForCausalLM:
    """One block, because an export takes seconds; with grouped heads where the preset is the modern one."""
    groups = {"num_key_value_heads": 2} if preset == "modern" else {}
    return hfllm.GPTForCausalLM(
        make_tiny_config(preset, vocab_size=300, num_hidden_layers=1, **{**groups, **overrides})
    ).eval()


@pytest.fixture(scope="module", params=["modern", "book"])
def exported(request, tmp_path_factory) -> tuple[hfllm.GPTForCausalLM, Path]:
    """A model and its file, in both presets; no two parts of it are alike, so a swap would show."""
    torch.manual_seed(0)
    model = make_model(request.param)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    model.train()
    path = export_onnx(model, tmp_path_factory.mktemp("onnx") / "exported" / "model.onnx")
    assert model.training and model.config._attn_implementation == "eager", "the export left its model changed"
    return model.eval(), path


def run(path: Path, input_ids: torch.Tensor, attention_mask=None, position_ids=None) -> torch.Tensor:
    """What onnxruntime makes of the file, given numpy arrays as anybody would give them."""
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    outputs = open_session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(outputs[0])


@cache
def open_session(path: Path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def random_ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape)


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


# The graph is traced with 2 rows of 8 tokens; the context is 32.
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 8), (1, 8), (5, 13), (1, 32), (4, 32)])
@torch.no_grad()
def test_onnxruntime_gives_the_logits_whatever_the_number_of_rows_and_tokens(exported, shape):
    model, path = exported
    input_ids = random_ids(model, *shape)
    assert_same(run(path, input_ids), model(input_ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_has_the_logits_of_the_row_alone(exported, side):
    model, path = exported
    input_ids, lengths = random_ids(model, 4, 9), [9, 6, 2, 1]
    kept = [slice(9 - length, 9) if side == "left" else slice(0, length) for length in lengths]
    mask = torch.zeros_like(input_ids)
    for row, part in enumerate(kept):
        mask[row, part] = 1
    logits = run(path, input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    assert logits.isfinite().all()
    for row, part in enumerate(kept):
        assert_same(logits[row, part], model(input_ids[row : row + 1, part]).logits[0])


@torch.no_grad()
def test_what_the_mask_hides_is_not_seen_even_where_the_positions_continue(exported):
    model, path = exported
    input_ids, mask = random_ids(model, 2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[:, :3] = 0
    input_ids[1, 3:] = input_ids[0, 3:]  # the rows differ in what is hidden alone
    logits = run(path, input_ids, mask)
    assert_same(logits[1, 3:], logits[0, 3:])
    position_ids = torch.arange(8).expand(2, 8)
    assert_same(logits[:, 3:], model(input_ids, attention_mask=mask, position_ids=position_ids).logits[:, 3:])


@torch.no_grad()
def test_documents_packed_into_one_row_do_not_see_each_other(exported):
    model, path = exported
    input_ids = random_ids(model, 2, 7)
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])  # two documents, and one
    logits = run(path, input_ids, position_ids=position_ids)
    assert_same(logits[0, :3], model(input_ids[:1, :3]).logits[0])
    assert_same(logits[0, 3:], model(input_ids[:1, 3:]).logits[0])
    assert_same(logits[1], model(input_ids[1:]).logits[0])


def test_the_runtime_refuses_a_position_beyond_learned_ones(exported):
    model, path = exported
    input_ids = random_ids(model, 1, 33)
    if model.config.position_embedding_type == "rotary":
        assert_same(run(path, input_ids), model(input_ids).logits.detach())
    else:
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
            run(path, input_ids)


def test_the_file_says_what_it_takes_and_what_it_is(exported):
    model, path = exported
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert file.opset_import[0].version == 20
    for value in file.graph.input:
        assert [dim.dim_param for dim in value.type.tensor_type.shape.dim] == ["batch_size", "sequence_length"]
    assert [value.name for value in file.graph.input] == ["input_ids", "attention_mask", "position_ids"]
    (logits,) = file.graph.output
    dims = logits.type.tensor_type.shape.dim
    assert (logits.name, dims[0].dim_param, dims[1].dim_param) == ("logits", "batch_size", "sequence_length")
    assert dims[2].dim_value == model.config.vocab_size
    assert {entry.key: entry.value for entry in file.metadata_props} == {
        "model_type": "hfllm_gpt",
        "max_position_embeddings": "32",
        "vocab_size": "300",
        "bos_token_id": "0",
        "eos_token_id": "1",
        "pad_token_id": "2",
    }


def test_tied_weights_are_in_the_file_once(exported):
    model, path = exported
    num_numbers = sum(
        torch.Size(tensor.dims).numel() for tensor in onnx.load(path).graph.initializer if tensor.data_type == 1
    )
    frequencies_and_constants = model.config.head_dim + 8
    assert model.num_parameters() <= num_numbers <= model.num_parameters() + frequencies_and_constants


def test_the_file_names_no_folder_of_this_machine(exported):
    _, path = exported
    content = path.read_bytes()
    assert os.fsencode(Path(hfllm.__file__).parent) not in content and b"site-packages" not in content


def test_a_single_file_is_written_and_nothing_beside_it(exported):
    _, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_verifying_compares_logits_and_finds_other_weights(exported):
    model, path = exported
    comparison = verify_onnx(path, model)
    assert comparison.largest_difference < 2e-5 and comparison.agreement == 1.0
    # 1 + 32 tokens in one row, 1 + 5 + 17 in three; then twice rows of 17, 8 and 1.
    assert comparison.num_positions == 33 + 3 * 23 + 2 * 26

    weight = model.model.layers[0].mlp.down_proj.weight
    original = weight.data.clone()
    weight.data[0, 0] += 0.5
    with pytest.raises(ValueError, match=r"does not give the logits.*largest \|difference\|"):
        verify_onnx(path, model)
    weight.data = original


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"an older one")

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(conversion, "_trace", lambda model: SmallProgram())
    monkeypatch.setattr("onnx.checker.check_model", fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        export_onnx(make_model("modern"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"an older one"


class SmallProgram:
    """What torch.onnx.export returns, with a graph that adds nothing to nothing."""

    def __init__(self):
        import onnx_ir

        self.model = onnx_ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
            small (float[1] x) => (float[1] y) <float[1] w = {1.0}> { y = Add(x, w) }""")


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(conversion, "_trace", lambda model: SmallProgram())
    export_onnx(make_model("modern"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]

    monkeypatch.setattr(conversion, "SINGLE_FILE_BYTES", 3)
    export_onnx(make_model("modern"), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    ones = onnxruntime.InferenceSession(str(path)).run(None, {"x": torch.ones(1).numpy()})[0]
    assert ones.tolist() == [2.0]

    monkeypatch.undo()
    monkeypatch.setattr(conversion, "_trace", lambda model: SmallProgram())
    export_onnx(make_model("modern"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"], "the older model's weights are still there"


def test_what_cannot_be_exported_says_why(tmp_path):
    path = tmp_path / "model.onnx"
    config = make_tiny_config("modern", num_hidden_layers=1)
    model = hfllm.GPTForCausalLM(config)
    with pytest.raises(ValueError, match=r"does not end in \.onnx.*out/model\.onnx"):
        export_onnx(model, "out")
    with pytest.raises(ValueError, match="not a causal language model"):
        export_onnx(AutoModelForSequenceClassification.from_config(config), path)
    with pytest.raises(ValueError, match="not a causal language model"):
        export_onnx(hfllm.GPTModel(config), path)
    with pytest.raises(ValueError, match="not a model of transformers"):
        export_onnx(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="A context of 3 tokens is too short"):
        export_onnx(make_model("book", max_position_embeddings=3), path)
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"rope_type='dynamic'.*the longest position"):
        export_onnx(make_model("modern", rope_parameters=scaled), path)
    with pytest.raises(FileNotFoundError, match="export_onnx writes one"):
        verify_onnx(path, model)
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_merged_first(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("modern"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"merge it first, model\.merge_and_unload"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.slow
def test_a_quantized_model_is_refused(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="from the extra 'interop'")
    make_model("modern").save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="is quantized"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"'{package}', which is not installed: pip install -e '.\[export\]'"):
        export_onnx(make_model("modern"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"'onnxruntime', which is not installed: pip install -e '.\[export\]'"):
        verify_onnx(tmp_path / "model.onnx", make_model("modern"))


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "gpt2": GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "llama": LlamaConfig(
        vocab_size=64,
        intermediate_size=48,
        num_key_value_heads=2,
        rope_parameters=LLAMA_3,
        initializer_range=0.3,
        **SIZES,
    ),
    "qwen3": Qwen3Config(
        vocab_size=64,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
        **SIZES,
    ),
    "two layers, soft-capped, untied": make_tiny_config(
        "modern", final_logit_softcapping=5.0, tie_word_embeddings=False
    ),
    "yarn": make_tiny_config("modern", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_native_models_and_other_variants_too(tmp_path, name):
    model = AutoModelForCausalLM.from_config(VARIANTS[name]).eval()
    path = export_onnx(model, tmp_path / "model.onnx")
    assert verify_onnx(path, model).largest_difference < 5e-5
    for shape in [(1, 1), (3, 5), (2, 32)]:
        input_ids = random_ids(model, *shape)
        assert_same(run(path, input_ids), model(input_ids, use_cache=False).logits)


@pytest.mark.slow
def test_half_precision_is_exported_in_float32(tmp_path):
    model = make_model("modern").to(torch.bfloat16)
    path = export_onnx(model, tmp_path / "model.onnx")
    assert next(model.parameters()).dtype == torch.bfloat16
    input_ids = random_ids(model, 2, 11)
    assert_same(run(path, input_ids), model.float()(input_ids).logits.detach())


@pytest.mark.slow
@torch.no_grad()
def test_weights_beside_the_file_are_found_wherever_the_folder_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SINGLE_FILE_BYTES", 1000)
    model = make_model("book")
    export_onnx(model, tmp_path / "first" / "model.onnx")
    (tmp_path / "first").rename(tmp_path / "second")
    assert sorted(file.name for file in (tmp_path / "second").iterdir()) == ["model.onnx", "model.onnx_data"]
    input_ids = random_ids(model, 2, 11)
    assert_same(run(tmp_path / "second" / "model.onnx", input_ids), model(input_ids).logits)
