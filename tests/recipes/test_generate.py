import json
import logging
import os
import shutil
import signal

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfllm import GPTConfig, GPTForCausalLM
from hfllm.cli.arguments import parse_arguments
from hfllm.serving.text import TextStream
from hfllm.tokenization import load_tokenizer, train_bpe
from tests.recipes.conftest import load_recipe, make_sentences


@pytest.fixture
def generate(capsys, monkeypatch):
    for name in ("hfllm.model", "transformers"):  # the recipe silences them
        monkeypatch.setattr(logging.getLogger(name), "level", logging.getLogger(name).level)
    recipe = load_recipe("generate")

    def run(**options) -> str:
        argv = []
        for name, value in options.items():
            argv += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
        capsys.readouterr()
        recipe.main(parse_arguments(recipe.GenerateArguments, argv))
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each preset: a model of 32 positions that learned 300 steps of sentences."""
    folders = {}
    tokenizer = train_bpe(make_sentences(100), 300)
    for preset in ("modern", "book"):
        torch.manual_seed(0)
        special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
        model = GPTForCausalLM(GPTConfig.from_preset(preset, vocab_size=len(tokenizer), **sizes, **special_ids))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = [ids[start : start + 32] for ids in tokenizer(make_sentences(300)).input_ids for start in (0, 20)]
        rows = torch.tensor([row for row in rows if len(row) == 32])
        for step in range(60):
            model(rows[step % 8 :: 8], labels=rows[step % 8 :: 8]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folders[preset] = tmp_path_factory.mktemp(preset)
        model.save_pretrained(folders[preset])
        tokenizer.save_pretrained(folders[preset])
    return folders


@pytest.fixture
def model(models):
    return models["book"]


def test_it_writes_what_the_model_makes_of_the_prompt(generate, model):
    text = generate(model=model, prompt="the cat", max_new_tokens=8)
    assert text.startswith("the cat")
    assert text == generate(model=model, prompt="the cat", max_new_tokens=8)
    assert text != generate(model=model, prompt="the cat", max_new_tokens=8, seed=1)


def test_it_writes_with_what_pretraining_left(generate, run_pretrain, small):
    run_pretrain(**small)
    assert generate(model=small["output_dir"], prompt="the cat", max_new_tokens=8).startswith("the cat")


def test_greedy_writing_has_no_luck_in_it(generate, model):
    first = generate(model=model, prompt="a dog", do_sample=False, seed=1, max_new_tokens=6)
    assert first == generate(model=model, prompt="a dog", do_sample=False, seed=2, max_new_tokens=6)


def test_without_a_prompt_it_begins_a_document(generate, model):
    assert generate(model=model, max_new_tokens=6).strip()


def test_several_samples_have_several_seeds(generate, model):
    text = generate(model=model, prompt="my bird", num_samples=2, max_new_tokens=6)
    assert "--- sample 1, seed 42" in text and "--- sample 2, seed 43" in text


def test_learned_positions_slide_past_the_context_and_it_says_so(generate, model):
    text = generate(model=model, prompt="the cat", do_sample=False, max_new_tokens=60)
    note, _, text = text.partition("\n")
    assert note.startswith("(Past the context of 32 tokens, each token is predicted from the last 32 alone")

    tokenizer, network = load_tokenizer(model), GPTForCausalLM.from_pretrained(model)
    prompt = tokenizer("the cat").input_ids
    ids = list(prompt)
    while len(ids) < len(prompt) + 60 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(network(torch.tensor([ids[-32:]]), use_cache=False).logits[0, -1].argmax()))
    assert len(ids) > 40, "the model stopped before its context was full: the test shows nothing"
    assert text.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True)


def test_rotary_positions_continue_and_it_says_so(generate, models):
    text = generate(model=models["modern"], prompt="the cat", max_new_tokens=60, do_sample=False)
    assert text.startswith("(Past the context of 32 tokens the model continues at positions that it did not see")
    assert text == generate(model=models["modern"], prompt="the cat", max_new_tokens=60, do_sample=False)


def test_within_the_context_it_says_nothing(generate, models):
    for folder in models.values():
        assert generate(model=folder, prompt="the cat", max_new_tokens=20).startswith("the cat")


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(generate, model):
    assert "the cat sees a dog. " * 40 in generate(model=model, prompt="the cat sees a dog. " * 40, max_new_tokens=3)


def test_a_model_that_ends_at_its_context_says_what_to_do(generate, model, tmp_path):
    shutil.copytree(model, tmp_path / "gpt2")
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    assert generate(model=tmp_path / "gpt2", prompt="the cat", max_new_tokens=20)
    with pytest.raises(
        ValueError, match=r"A gpt2 cannot write past its context.*takes 3\. Give --max_new_tokens 29, or"
    ):
        generate(model=tmp_path / "gpt2", prompt="the cat", max_new_tokens=40)
    with pytest.raises(
        ValueError, match="Give a shorter prompt, or convert it into an hfllm model, whose context slides"
    ):
        generate(model=tmp_path / "gpt2", prompt="the cat sees a dog. " * 10)


def test_several_prompts_are_each_continued_as_if_alone(generate, model, tmp_path):
    prompts = ["the cat", "a dog sees my bird. one", "my"]
    alone = [generate(model=model, prompt=prompt, do_sample=False, max_new_tokens=8).rstrip("\n") for prompt in prompts]
    expected = "".join(f"--- prompt {index}\n{text}\n" for index, text in enumerate(alone, start=1))
    assert generate(model=model, prompt=prompts, do_sample=False, max_new_tokens=8) == expected

    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    assert generate(model=model, prompt_file=tmp_path / "prompts.txt", do_sample=False, max_new_tokens=8) == expected
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert generate(model=model, prompt_file=tmp_path / "prompts.jsonl", do_sample=False, max_new_tokens=8) == expected


def test_a_tokenizer_without_a_pad_token_pads_with_what_nobody_sees(generate, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").pad_token is None
    options = {"prompt": ["the cat", "a dog sees my bird. one"], "do_sample": False, "max_new_tokens": 8}
    assert generate(model=tmp_path / "model", **options) == generate(model=model, **options)


def test_several_samples_of_several_prompts_are_told_apart(generate, model):
    text = generate(model=model, prompt=["the cat", "a dog"], num_samples=2, max_new_tokens=4)
    headers = [line for line in text.splitlines() if line.startswith("---")]
    assert headers == [
        "--- prompt 1, sample 1, seed 42",
        "--- prompt 2, sample 1, seed 42",
        "--- prompt 1, sample 2, seed 43",
        "--- prompt 2, sample 2, seed 43",
    ]


def test_a_text_ends_with_the_first_stop_that_it_writes(generate, model):
    whole = generate(model=model, prompt="the cat", do_sample=False, max_new_tokens=24).rstrip("\n")
    continuation = whole.removeprefix("the cat")
    early, late = continuation[4:7], continuation[12:16]
    end = min(whole.index(stop, len("the cat")) + len(stop) for stop in (early, late))
    stopped = generate(model=model, prompt="the cat", do_sample=False, max_new_tokens=24, stop=[late, early])
    assert stopped == f"{whole[:end]}\n"

    both = generate(model=model, prompt=["the cat", "a dog"], do_sample=False, max_new_tokens=24, stop=[late, early])
    assert both.splitlines()[1] == whole[:end]


def test_a_stop_inside_a_token_cuts_the_token_of_one_prompt_and_of_several(generate, model):
    options = {"do_sample": False, "max_new_tokens": 24}
    whole = generate(model=model, prompt="the cat", **options).rstrip("\n")
    tokens = load_tokenizer(model).tokenize(whole.removeprefix("the cat"))
    long = next(token for token in tokens[3:] if token[0] == "Ġ" and len(token) > 3)  # a space and a word
    stop = long[1:3]  # ends before the token does
    expected = whole[: whole.index(stop, len("the cat")) + len(stop)]
    assert generate(model=model, prompt="the cat", stop=[stop], **options) == f"{expected}\n"
    both = generate(model=model, prompt=["the cat", "a dog"], stop=[stop], **options)
    assert both.startswith(f"--- prompt 1\n{expected}\n--- prompt 2\na dog")


def test_ctrl_c_keeps_what_was_written_and_ends(generate, model, monkeypatch, capsys):
    put, calls = TextStream.put, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without one

    def put_and_interrupt(self, token_id):
        calls.append(token_id)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return put(self, token_id)

    whole = generate(model=model, prompt="the cat", do_sample=False, max_new_tokens=20)
    monkeypatch.setattr(TextStream, "put", put_and_interrupt)
    with pytest.raises(SystemExit) as stopped:
        generate(model=model, prompt="the cat", do_sample=False, max_new_tokens=20)
    signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    written = capsys.readouterr().out
    assert written.endswith("\n(stopped)\n")
    assert whole.startswith(written.removesuffix("\n(stopped)\n"))
    assert len("the cat") < len(written.removesuffix("\n(stopped)\n")) < len(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "--temperature 0.0: it must be at least 0.0001; --do_sample false is greedy"),
        ({"temperature": "nan"}, "--temperature nan"),
        ({"top_p": 2}, "--top_p 2.0: give more than 0 and at most 1"),
        ({"top_p": 0}, "--top_p 0.0"),
        ({"top_k": -1}, "--top_k -1: give at least 0"),
        ({"max_new_tokens": -5}, "--max_new_tokens -5: give at least 1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"num_samples": 0}, "--num_samples 0: give at least 1"),
        ({"repetition_penalty": 0}, "--repetition_penalty 0.0: give more than 0"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 4,294,967,295"),
        ({"seed": 2**32 - 1, "num_samples": 2}, "--seed 4294967295"),
        ({"prompt": ""}, "--prompt '' is empty: leave it out to begin a document"),
        ({"prompt": ["a", ""]}, "--prompt '' is empty"),
        ({"stop": ""}, "--stop '' would stop everywhere"),
        ({"prompt": "a", "prompt_file": "b"}, "give one of the two"),
        ({"do_sample": False, "temperature": 0.5, "top_k": 3}, "draws nothing: leave out --temperature, --top_k"),
        ({"do_sample": False, "num_samples": 3}, "--do_sample false writes one text, not --num_samples 3"),
        ({"temperature": 0, "stop": ""}, "--temperature 0.0.* --stop ''"),
        ({"top_k": -1, "top_p": 2}, "--top_p 2.0.* --top_k -1"),
        ({"prompt_file": "nowhere.txt"}, "prompt_file='nowhere.txt' is not a file"),
    ],
)
def test_impossible_options_are_refused_at_the_start(generate, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model="not even looked for", **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", b"caf\xe9", "line 1 holds bytes that are not UTF-8"),
        ("text.jsonl", b"the cat", "line 1: not valid JSON"),
        ("other.jsonl", b'{"text": "the cat"}', "line 1: there is no column 'prompt' but"),
        ("number.jsonl", b'{"prompt": 3}', "line 1: its 'prompt' is a number, not a string"),
        ("half.jsonl", rb'{"prompt": "\ud800"}', "line 1: its 'prompt' holds half a surrogate pair"),
    ],
)
def test_a_file_without_prompts_says_so(generate, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate(model="not even looked for", prompt_file=tmp_path / name)


def test_a_tokenizer_of_another_model_is_recognised(generate, model, tmp_path):
    shutil.copytree(model, tmp_path / "mixed")
    GPTForCausalLM(GPTConfig(vocab_size=40, hidden_size=32, num_attention_heads=2)).save_pretrained(tmp_path / "mixed")
    with pytest.raises(
        ValueError, match=r"the model's vocabulary has only 40 ids: the tokenizer belongs to another model"
    ):
        generate(model=tmp_path / "mixed", prompt="the cat")


def test_a_damaged_checkpoint_says_so(generate, model, tmp_path):
    shutil.copytree(model, tmp_path / "damaged")
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="its weights cannot be read, save or download them again"):
        generate(model=tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "hfllm_gpt", "hidden_size": "x"}')
    with pytest.raises(ValueError, match=r"cannot be opened: config\.json: Field 'hidden_size' expected int"):
        generate(model=tmp_path / "damaged")


def test_a_folder_without_a_model_says_what_to_do(generate, tmp_path):
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match=r"without a config.json.*log\.jsonl.*to resume it"):
        generate(model=tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a model that the Hub sent"):
        generate(model="nobody/nothing")
