import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from hfllm import GPTForCausalLM
from hfllm.cli.arguments import parse_arguments
from tests.conftest import make_tiny_config
from tests.recipes.conftest import load_recipe


PROMPT = "the cat sees a dog"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("inspect_model")


@pytest.fixture
def drawn(recipe, monkeypatch):
    """What would have been drawn, for tests that are not about pictures: drawing takes a second."""
    calls = []
    for name in ("plot_attention", "plot_probabilities"):
        monkeypatch.setattr(recipe, name, lambda *args, name=name, **kwargs: calls.append((name, args, kwargs)))
    return calls


@pytest.fixture
def inspect(recipe, tmp_path, capsys):
    """Run the recipe; returns what inspection.json says, and what was printed."""

    def run(model, prompt=PROMPT, **options):
        options = {"model": model, "prompt": prompt, "output_dir": tmp_path / "out", **options}
        capsys.readouterr()
        recipe.main(parse_arguments(recipe.InspectArguments, [f"--{name}={value}" for name, value in options.items()]))
        numbers = json.loads((tmp_path / "out" / "inspection.json").read_text(encoding="utf-8"))
        return numbers, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def one_layer(tokenizer_folder, tmp_path_factory):
    """The book's GPT with one block of two heads, small enough to compute by hand."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("one_layer")
    sizes = {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTForCausalLM(make_tiny_config("book", initializer_range=0.6, **sizes)).save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(path)
    return path


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def attention_by_hand(folder, input_ids: list[int]) -> np.ndarray:
    """Softmax of queries with keys (2, T, T), as chapter 3 has it, from the weights alone."""
    weights = GPTForCausalLM.from_pretrained(folder).state_dict()
    state = {name: tensor.double().numpy() for name, tensor in weights.items()}
    x = state["model.embed_tokens.weight"][input_ids] + state["model.embed_positions.weight"][: len(input_ids)]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    block = "model.layers.0."
    x = x * state[block + "input_layernorm.weight"] + state[block + "input_layernorm.bias"]
    query, key = (
        x @ state[f"{block}self_attn.{name}.weight"].T + state[f"{block}self_attn.{name}.bias"]
        for name in ("q_proj", "k_proj")
    )
    future = np.triu(np.ones((len(x), len(x)), dtype=bool), 1)
    heads = [slice(0, 4), slice(4, 8)]
    return np.stack([softmax(np.where(future, -np.inf, query[:, h] @ key[:, h].T / 2)) for h in heads])


def test_each_token_has_the_probability_that_the_models_logits_give_it(inspect, one_layer, drawn):
    numbers, printed = inspect(one_layer)
    input_ids = AutoTokenizer.from_pretrained(one_layer)(PROMPT).input_ids
    model = AutoModelForCausalLM.from_pretrained(one_layer)
    with torch.no_grad():
        probabilities = softmax(model(torch.tensor([input_ids])).logits[0].double().numpy())

    assert [token["id"] for token in numbers["tokens"]] == input_ids
    assert numbers["tokens"][0] == {"id": 0, "token": "<|startoftext|>", "probability": None}
    for place, token in enumerate(numbers["tokens"][1:]):
        expected = probabilities[place, token["id"]]
        assert token["probability"] == pytest.approx(expected, rel=1e-4)
        assert token["nats"] == pytest.approx(-math.log(expected), abs=1e-4)
        assert token["rank"] == 1 + (probabilities[place] > expected).sum()
        best = np.argsort(-probabilities[place])[:5].tolist()
        assert [candidate["id"] for candidate in token["likeliest"]] == best
        assert [candidate["probability"] for candidate in token["likeliest"]] == pytest.approx(
            probabilities[place, best].tolist(), rel=1e-4
        )
    assert [candidate["id"] for candidate in numbers["next_tokens"]] == np.argsort(-probabilities[-1])[:5].tolist()
    mean = np.mean([token["nats"] for token in numbers["tokens"][1:]])
    assert f"{mean:.3f} nats per token over {len(input_ids) - 1} tokens" in printed


def test_a_heads_numbers_are_those_of_its_attention_computed_by_hand(inspect, one_layer, drawn):
    numbers, _ = inspect(one_layer)
    maps = attention_by_hand(one_layer, [token["id"] for token in numbers["tokens"]])
    queries = range(2, maps.shape[1])
    assert len(queries) > 3
    assert [(head["layer"], head["head"]) for head in numbers["heads"]] == [(0, 0), (0, 1)]
    for head, weights in zip(numbers["heads"], maps):
        assert head["to_first"] == pytest.approx(np.mean([weights[t, 0] for t in queries]), abs=1e-5)
        assert head["to_previous"] == pytest.approx(np.mean([weights[t, t - 1] for t in queries]), abs=1e-5)
        assert head["to_itself"] == pytest.approx(np.mean([weights[t, t] for t in queries]), abs=1e-5)
        distances = [sum(weights[t, s] * (t - s) for s in range(t + 1)) for t in queries]
        assert head["distance"] == pytest.approx(np.mean(distances), abs=1e-4)
        entropies = [-sum(weights[t, s] * math.log(weights[t, s]) for s in range(t + 1)) for t in queries]
        assert head["entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)


def test_the_habits_of_clear_heads_are_named(recipe):
    """Six heads over four tokens: their numbers can be checked by eye, from the third token on."""
    previous = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    first = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    itself = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    evenly = [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1 / 4, 1 / 4, 1 / 4, 1 / 4]]
    barely = [[1, 0, 0, 0], [1, 0, 0, 0], [0.48, 0.52, 0, 0], [0.48, 0, 0.52, 0]]
    hardly = [[1, 0, 0, 0], [1, 0, 0, 0], [0.52, 0.48, 0, 0], [0, 0.54, 0.46, 0]]
    attentions = torch.tensor([[previous, first, itself], [evenly, barely, hardly]])
    heads, even = recipe.describe_heads(attentions)
    assert [(head["layer"], head["head"], head["looks_at"]) for head in heads] == [
        (0, 0, "the previous token"),
        (0, 1, "the first token"),
        (0, 2, "itself"),
        (1, 0, "everything evenly"),
        (1, 1, "the previous token"),
        (1, 2, None),
    ]
    assert [head["distance"] for head in heads[:4]] == pytest.approx([1.0, 2.5, 0.0, 1.25])
    assert [head["entropy"] for head in heads[:3]] == [0, 0, 0]
    assert heads[3]["entropy"] == pytest.approx((math.log(3) + math.log(4)) / 2)
    assert {name: heads[3][name] for name in even} == pytest.approx(even)
    assert even["to_first"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_the_summary_names_what_is_remarkable(recipe, capsys):
    first = torch.zeros(4, 4)
    first[:, 0] = 1
    mixed = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.5, 0.4, 0], [0.0, 0.1, 0.4, 0.5]])
    heads, even = recipe.describe_heads(torch.stack([first, mixed])[None])
    recipe.print_heads(heads, even, 4)
    printed = capsys.readouterr().out
    assert "Most at the first token (1 give it more than half): layer 0 head 0 100%, layer 0 head 1 5%" in printed
    assert "Most at the previous token: layer 0 head 1 45%, layer 0 head 0 0%" in printed
    assert "each token 29%" in printed


def test_pictures_are_drawn_of_all_heads_and_of_one(inspect, one_layer, tmp_path):
    inspect(one_layer)
    _, printed = inspect(one_layer, layer=0, head=1)
    names = ["attention.png", "attention_layer0_head1.png", "probabilities.png"]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == names
    assert str(tmp_path / "out" / "attention_layer0_head1.png") in printed
    for name in names:
        pixels = imread(tmp_path / "out" / name)
        assert min(pixels.shape[:2]) > 250 and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_a_large_model_is_shown_in_part_and_it_says_so(inspect, tokenizer_folder, tmp_path, drawn):
    config = make_tiny_config("modern", vocab_size=300, num_hidden_layers=14, num_attention_heads=2, hidden_size=8)
    GPTForCausalLM(config).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "deep")
    numbers, printed = inspect(tmp_path / "deep")
    assert "attention.png shows 24 of 28 heads" in printed
    assert len(numbers["heads"]) == 28
    (maps, titles, *_), options = next(call[1:] for call in drawn if call[0] == "plot_attention")
    assert len(maps) == len(titles) == 24 and options["num_columns"] == 2
    assert titles[0].startswith("layer 0, head 0") and titles[-1].startswith("layer 13, head 1")


def test_a_layer_is_drawn_with_all_its_heads(inspect, one_layer, drawn):
    numbers, _ = inspect(one_layer, layer=0)
    (maps, titles, labels, path), _ = next(call[1:] for call in drawn if call[0] == "plot_attention")
    expected = attention_by_hand(one_layer, [token["id"] for token in numbers["tokens"]])
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert path.name == "attention_layer0.png" and titles[1].startswith("layer 0, head 1")
    assert labels == [token["token"] for token in numbers["tokens"]]


def test_layers_are_left_out_evenly(recipe):
    assert recipe.spread(3, 12) == [0, 1, 2]
    assert recipe.spread(24, 4) == [0, 8, 15, 23]
    assert recipe.spread(1, 12) == [0]


def test_a_model_of_transformers_is_looked_into_as_well(inspect, tokenizer_folder, tmp_path, drawn):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    numbers, _ = inspect(tmp_path / "gpt2")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    loss = model(ids, labels=ids).loss.item()
    assert np.mean([token["nats"] for token in numbers["tokens"][1:]]) == pytest.approx(loss, abs=1e-4)
    assert len(numbers["heads"]) == 4


def test_without_a_prompt_there_is_a_next_token_and_nothing_else(inspect, one_layer, tmp_path):
    numbers, printed = inspect(one_layer, prompt="")
    assert [token["token"] for token in numbers["tokens"]] == ["<|startoftext|>"]
    assert len(numbers["next_tokens"]) == 5
    assert {head["entropy"] for head in numbers["heads"]} == {None}
    assert "give a longer --prompt" in printed
    assert not (tmp_path / "out" / "attention.png").exists() and (tmp_path / "out" / "probabilities.png").exists()


def test_a_long_prompt_is_looked_into_from_its_beginning(inspect, one_layer, drawn):
    numbers, printed = inspect(one_layer, prompt="the cat sees a dog. " * 20, max_tokens=7)
    beginning = AutoTokenizer.from_pretrained(one_layer)("the cat sees a dog. " * 20).input_ids[:7]
    assert [token["id"] for token in numbers["tokens"]] == beginning
    assert "Only the first 7 of the prompt's" in printed
    message = r"The prompt has 40 tokens, and the model's context is 32.*--max_tokens 32"
    with pytest.raises(ValueError, match=message):
        inspect(one_layer, prompt="the cat sees a dog. " * 20, max_tokens=40)


def test_whitespace_and_pieces_of_characters_can_be_read(recipe, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer("a b\n\t\r☃ $x$").input_ids
    labels = [recipe.label_token(tokenizer, token_id) for token_id in ids]
    assert labels[0] == "<|startoftext|>"
    assert "".join(labels[1:]) == "a␣b↵→←<E2><98><83>␣$x$"
    assert recipe.label_token(tokenizer, 100_000) == "<unused 100000>"


def test_pieces_that_are_not_bytes_can_be_read(recipe):
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "h": 1, "▁h": 2, "日": 3}, merges=[("▁", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [recipe.label_token(tokenizer, token_id) for token_id in tokenizer("h 日").input_ids] == ["␣h", "␣", "日"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, r"--layer 1: .* has 1 layers, counted from 0 to 0"),
        ({"layer": 0, "head": 2}, r"--head 2: .* has 2 heads, counted from 0 to 1"),
        ({"head": 0}, "of which layer"),
        ({"top_k": 0}, "--top_k 0: give a number from 1 to 100"),
        ({"max_tokens": 0}, "--max_tokens 0: give at least 1"),
    ],
)
def test_a_choice_that_does_not_exist_is_named(inspect, one_layer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        inspect(one_layer, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused_with_the_next_step(inspect, tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match="neither a folder nor a model that the Hub sent"):
        inspect("nobody/nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"without a config.json"):
        inspect(tmp_path / "run")


def test_a_model_without_attention_has_nothing_to_look_at(inspect, tmp_path, tokenizer_folder):
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, state_size=4))
    model.save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ValueError, match="attention"):
        inspect(tmp_path / "mamba")
