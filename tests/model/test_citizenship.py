"""transformers treats our models like its own: generating, loading, resizing, sharding, compiling."""

import math
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

import hfllm
from tests.conftest import make_tiny_config


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The text "w5 w6" is the ids 5 and 6."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w2", eos_token="w1")


# Generating


def greedy_by_hand(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_generating_with_a_cache_gives_the_tokens_of_generating_without(tiny_model):
    ids = random_ids(3, 5)
    expected = greedy_by_hand(tiny_model, ids, 12)
    for use_cache in (True, False):
        tokens = tiny_model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)
        assert torch.equal(tokens, expected)


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(tiny_model):
    prompts = [random_ids(1, 3), random_ids(1, 7)]
    alone = [greedy_by_hand(tiny_model, prompt, 8)[:, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([torch.cat([torch.full((1, 4), 2), prompts[0]], dim=1), prompts[1]])
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    tokens = tiny_model.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens[:, 7:], torch.cat(alone))


def test_rows_of_a_batch_stop_each_at_their_own_end_token(tiny_model):
    ids = random_ids(4, 5)
    free = tiny_model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[:, 5:]
    stop = int(free[0, 2])
    stopped = tiny_model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=2)[:, 5:]
    for row in range(4):
        ends = (free[row] == stop).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 10
        assert torch.equal(stopped[row, :length], free[row, :length])
        assert (stopped[row, length:] == 2).all()


def test_a_search_as_wide_as_the_vocabulary_finds_the_likeliest_continuation(tiny_model):
    """64 beams keep every first token, so the search is exhaustive; against the 4,096 pairs, one by one."""
    prompt = random_ids(1, 4)
    found = tiny_model.generate(prompt, num_beams=64, max_new_tokens=2, do_sample=False, eos_token_id=None)
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    texts = torch.cat([prompt.expand(4096, -1), pairs], dim=1)
    with torch.no_grad():
        log_probabilities = tiny_model(texts, use_cache=False).logits.log_softmax(-1)
    first = log_probabilities[:, 3].gather(1, pairs[:, :1])
    second = log_probabilities[:, 4].gather(1, pairs[:, 1:])
    assert torch.equal(found[0], texts[(first + second).argmax()])


def test_sampling_draws_tokens_as_often_as_the_model_says(tiny_model):
    prompt = random_ids(1, 4)
    drawn = tiny_model.generate(
        prompt, do_sample=True, temperature=2.0, top_k=5, max_new_tokens=1, num_return_sequences=4000, eos_token_id=None
    )[:, -1]
    values, tokens = (tiny_model(prompt).logits[0, -1] / 2.0).topk(5)
    assert set(drawn.tolist()) <= set(tokens.tolist())
    for token, probability in zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert (drawn == token).float().mean().item() == pytest.approx(probability, abs=4 * spread)


@pytest.mark.parametrize("helper", ["a smaller model", "the prompt", "its own first layer"])
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(tiny_model, helper):
    prompt = random_ids(1, 5)
    smaller = hfllm.GPTForCausalLM(make_tiny_config("book", num_hidden_layers=1)).eval()
    arguments = {
        "a smaller model": {"assistant_model": smaller},
        "the prompt": {"prompt_lookup_num_tokens": 3},
        "its own first layer": {"assistant_early_exit": 1},
    }[helper]
    calls = [0, 0]
    for index, layer in enumerate(tiny_model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    tokens = tiny_model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, **arguments)
    # A draft of the first layer alone passes the second layer by.
    assert calls[0] > calls[1] if helper == "its own first layer" else calls[0] == calls[1]
    assert torch.equal(tokens, greedy_by_hand(tiny_model, prompt, 12))


def test_a_static_cache_gives_the_tokens_of_a_growing_one(tiny_model):
    ids = random_ids(3, 5)
    tokens = tiny_model.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    assert torch.equal(tokens, greedy_by_hand(tiny_model, ids, 12))


@pytest.mark.slow
def test_compiled_generating_gives_the_same_tokens(tiny_model):
    ids = random_ids(3, 5)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # transformers' default is accelerators only
    tokens = tiny_model.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch.equal(tokens, greedy_by_hand(tiny_model, ids, 12))


def test_continuous_batching_gives_the_tokens_of_each_prompt_alone(tiny_model):
    prompts = [random_ids(length).tolist() for length in (4, 3, 6)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=2)
    # By itself the cache would take most of the machine's free memory.
    sizes = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    results = tiny_model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=sizes, progress_bar=False
    )
    for prompt, result in zip(prompts, results.values(), strict=True):
        assert result.prompt_ids == prompt
        assert [*prompt, *result.generated_tokens] == greedy_by_hand(tiny_model, torch.tensor([prompt]), 6)[0].tolist()


def test_generating_can_return_attentions_and_hidden_states(tiny_config):
    model = hfllm.GPTForCausalLM._from_config(tiny_config, attn_implementation="eager").eval()
    output = model.generate(
        random_ids(2, 5),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert [step[0].shape for step in output.attentions] == [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    assert [step[-1].shape for step in output.hidden_states] == [(2, 5, 32), (2, 1, 32), (2, 1, 32)]


# Saving, loading and everyday tools


def test_tied_weights_are_one_tensor_after_loading(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_untied_weights_stay_two_tensors_after_loading(tmp_path):
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_auto_classes_open_every_head_without_a_flag(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is hfllm.GPTForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is hfllm.GPTModel
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is hfllm.GPTForSequenceClassification


def test_a_reader_without_hfllm_opens_the_folder_through_each_auto_class(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    config = make_tiny_config("modern", classifier_pooling="mean")
    classifier = hfllm.GPTForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    ids = random_ids(1, 9)
    expected = {
        "AutoModel": tiny_model.model(ids).last_hidden_state,
        "AutoModelForCausalLM": tiny_model(ids).logits,
        "AutoModelForSequenceClassification": classifier(ids).logits,
    }
    torch.save(expected, tmp_path / "expected.pt")
    program = f"""
import sys, torch, transformers
sys.modules["hfllm"] = None  # importing it is an error, as if it were not installed
torch.set_num_threads(1)
ids = torch.tensor({ids.tolist()})
config = transformers.AutoConfig.from_pretrained("model", trust_remote_code=True)
assert config.model_type == "hfllm_gpt" and type(config).__module__.startswith("transformers_modules")
for name, expected in torch.load("expected.pt").items():
    folder = "classifier" if name.endswith("Classification") else "model"
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(ids)[0], expected), name
    model.save_pretrained(f"again/{{name}}")
    again = getattr(transformers, name).from_pretrained(f"again/{{name}}", trust_remote_code=True)
    assert torch.equal(again(ids)[0], expected), name
transformers.AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True, num_labels=2)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_importing_prints_nothing():
    """Nothing more than transformers' own models print: an installed package may print something on import."""
    program = """
import sys
import transformers.models.llama.modeling_llama
print("---", flush=True)
print("---", flush=True, file=sys.stderr)
import hfllm
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "---\n"
    assert finished.stderr.endswith("---\n")


def test_the_forward_takes_the_keywords_that_trainer_counts_on():
    from inspect import Parameter, signature

    parameters = signature(hfllm.GPTForCausalLM.forward).parameters.values()
    assert any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_pools_the_last_token_of_the_attention_mask(tiny_config, side):
    classifier = hfllm.GPTForSequenceClassification(tiny_config).eval()
    # The text ends in the pad token's own id: looking for the id, not at the mask, would pool the token before.
    text = torch.tensor([[5, 6, 7, 2]])
    padding = torch.full((1, 3), 2)
    batch = torch.cat([padding, text] if side == "left" else [text, padding], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 1, 0, 0, 0]])
    expected = classifier.score(classifier.model(text).last_hidden_state[:, -1])
    torch.testing.assert_close(classifier(batch, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config)
    ids = random_ids(2, 16)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_pipeline_continues_a_prompt(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path))
    [answer] = generate("w5 w6", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("w5 w6")


@pytest.mark.slow
def test_the_model_compiles_as_one_graph(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config).eval()
    ids = random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )


def test_a_growing_and_a_given_cache_come_back_filled(tiny_model):
    """Also where the config says that a cache is not made, as it does after training."""
    tiny_model.config.use_cache = False
    assert tiny_model(random_ids(1, 4)).past_key_values is None
    cache = tiny_model(random_ids(1, 4), use_cache=True).past_key_values
    assert tiny_model(random_ids(1, 1), past_key_values=cache).past_key_values.get_seq_length() == 5


@pytest.mark.parametrize("preset", ["modern", "book"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [80, 48], ids=["grown", "shrunk"])
def test_a_resized_vocabulary_keeps_the_logits_of_the_tokens_that_stay(preset, tied, size, tmp_path):
    model = hfllm.GPTForCausalLM(make_tiny_config(preset, tie_word_embeddings=tied)).eval()
    ids = torch.randint(3, 48, (2, 6))
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert (model.config.vocab_size, model.vocab_size) == (size, size)
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (size, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    kept = min(size, 64)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    if size > 64:
        assert torch.isfinite(model(torch.full((1, 2), size - 1), labels=torch.full((1, 2), size - 1)).loss)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_a_resized_classifier_keeps_its_answers(tiny_config, tmp_path):
    model = hfllm.GPTForSequenceClassification(tiny_config).eval()
    ids = random_ids(2, 6)
    before = model(ids).logits
    model.resize_token_embeddings(80)
    torch.testing.assert_close(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(hfllm.GPTForSequenceClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_tied_head_can_be_untied_and_an_untied_one_tied(tiny_model, tmp_path):
    ids = random_ids(2, 6)
    before = tiny_model(ids).logits
    tiny_model.config.tie_word_embeddings = False
    tiny_model.lm_head.weight = nn.Parameter(tiny_model.lm_head.weight.clone())
    tiny_model.save_pretrained(tmp_path / "untied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(untied(ids).logits, before)
    with torch.no_grad():
        untied.lm_head.weight.zero_()
    assert not torch.equal(untied.get_input_embeddings().weight, untied.lm_head.weight)

    untied.config.tie_word_embeddings = True
    untied.tie_weights()
    untied.save_pretrained(tmp_path / "tied")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert torch.equal(tied(ids).logits, before)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_places_the_model(tiny_model, tmp_path, device_map):
    tiny_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    ids = random_ids(1, 5)
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), tiny_model(ids).logits, atol=1e-5, rtol=1e-5)


def test_blocks_may_stay_on_the_disk(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys([name for name, _ in tiny_model.model.named_children() if name != "layers"], "cpu")
    device_map = {f"model.{name}": device for name, device in device_map.items()}
    device_map |= {"lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.layers[0].mlp.up_proj.weight.is_meta
    ids = random_ids(1, 5)
    torch.testing.assert_close(loaded(ids).logits, tiny_model(ids).logits)
    tokens = loaded.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, greedy_by_hand(tiny_model, ids, 4))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
def test_half_precision_computes_throughout_and_stays_near(tiny_config, tmp_path, backend, dtype, tolerance):
    tiny_config.initializer_range = 0.1
    model = hfllm.GPTForCausalLM(tiny_config).eval()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation=backend)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    ids = random_ids(2, 16)
    output = half(ids, labels=ids, use_cache=True)
    assert output.logits.dtype == output.past_key_values.layers[0].keys.dtype == dtype
    assert (output.logits.float() - model(ids).logits).abs().max() < tolerance * model(ids).logits.abs().max()
    output.loss.backward()
    assert half.generate(ids[:, :4], max_new_tokens=3, eos_token_id=None).shape == (2, 7)


def test_the_angles_of_rotary_positions_stay_in_single_precision(tmp_path):
    """In bfloat16 a frequency has 8 bits: position 1,000 would be turned by up to two radians too much."""
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_the_dtype_of_a_checkpoint_is_kept(tiny_model, tmp_path):
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_pipeline_names_the_class_of_a_text(tiny_config):
    tiny_config.id2label = {0: "ham", 1: "spam"}
    classifier = hfllm.GPTForSequenceClassification(tiny_config).eval()
    with torch.no_grad():
        classifier.score.weight[0].neg_().add_(classifier.score.weight[1])
    tokenizer = word_tokenizer()
    [answer] = pipeline("text-classification", model=classifier, tokenizer=tokenizer)("w5 w6 w7")
    probabilities = classifier(torch.tensor([[5, 6, 7]])).logits[0].softmax(-1)
    assert answer["label"] == ["ham", "spam"][int(probabilities.argmax())]
    assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


# A plan for several devices


def test_the_plan_of_tensor_parallelism_names_what_the_model_has(tiny_model):
    modules = {name for name, _ in tiny_model.named_modules()}
    for rule in tiny_model.tp_plan:
        assert any(rule.replace("*", str(index)) in modules for index in range(2)), rule
    linears = {name for name, module in tiny_model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.replace(".0.", ".*.").replace(".1.", ".*.") for name in linears} <= set(tiny_model.tp_plan)


def test_a_pipeline_over_devices_is_refused_where_each_stage_would_add_the_positions():
    assert hfllm.GPTModel(make_tiny_config("modern")).supports_pp_plan
    assert not hfllm.GPTModel(make_tiny_config("book")).supports_pp_plan


SHARDED = """
import os, sys
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
import hfllm

torch.set_num_threads(1)
folder, sizes = sys.argv[1], {sys.argv[2]: 2}
dist.init_process_group("gloo")
torch.manual_seed(0)
ids = torch.randint(3, 64, (2, 12))
whole = hfllm.GPTForCausalLM.from_pretrained(folder)
sharded = hfllm.GPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
local = sum(getattr(parameter, "to_local", lambda: parameter)().numel() for parameter in sharded.parameters())
assert local < 0.6 * sum(parameter.numel() for parameter in whole.parameters()), "the weights are not cut in two"
losses = []
for model in (whole, sharded):
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    losses.append(output.loss.item())
    logits = output.logits.full_tensor() if hasattr(output.logits, "full_tensor") else output.logits
    if model is whole:
        expected = logits
torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
gradients = dict(whole.named_parameters())
for name, parameter in sharded.named_parameters():
    gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(gradient, gradients[name].grad, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tp_size", "fsdp_size"])
def test_two_processes_with_half_the_weights_each_compute_the_same(tiny_config, tmp_path, size):
    model = hfllm.GPTForCausalLM(tiny_config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # a bias that is added once too often shows only if it is not zero
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "sharded.py").write_text(SHARDED)
    arguments = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    finished = subprocess.run(
        [sys.executable, *arguments, tmp_path / "sharded.py", tmp_path / "model", size],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr


# Compiling


@pytest.mark.slow
def test_training_compiles_as_one_graph_with_packed_documents(tiny_config):
    model = hfllm.GPTForCausalLM(tiny_config)
    ids = random_ids(2, 12)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], list(range(12))])
    arguments = {"labels": ids, "position_ids": position_ids, "use_cache": False}
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(ids, **arguments).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, compiled, atol=1e-5, rtol=1e-4)
