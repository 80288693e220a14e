"""Generating past the context. The reference is chapter 4's loop: one row, no cache, the ids cropped at each step."""

import logging

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import _speculative_sampling

import hfllm
from hfllm.model import generation_gpt
from hfllm.tokenization import train_bpe
from tests.conftest import make_tiny_config


CONTEXT = 12  # positions of the tables below
PROMPTS = [[5, 9, 11, 7, 30], [40, 8], [3, 60, 22, 17, 17, 9, 31]]


def make_model(preset: str = "book", **overrides) -> hfllm.GPTForCausalLM:
    config = make_tiny_config(preset, **{"max_position_embeddings": CONTEXT, "eos_token_id": None, **overrides})
    return hfllm.GPTForCausalLM(config).eval()


@pytest.fixture
def model() -> hfllm.GPTForCausalLM:
    return make_model()


@torch.no_grad()
def next_logits(model, tokens: list[int], context: int | None = CONTEXT) -> torch.Tensor:
    window = tokens if context is None else tokens[-context:]
    return model(torch.tensor([window]), use_cache=False).logits[0, -1]


def write_greedily(model, prompt: list[int], num_tokens: int, context: int | None = CONTEXT) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(next_logits(model, tokens, context).argmax()))
    return tokens


def pad_left(prompts: list[list[int]], width: int | None = None) -> dict[str, torch.Tensor]:
    width = width or max(map(len, prompts))
    rows = [[2] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def count_tokens_per_pass(model) -> list[int]:
    """A list to which each forward pass appends how many tokens went through it."""
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return lengths


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_each_token_past_the_table_is_what_the_last_ones_say(model, options):
    written = model.generate(**pad_left(PROMPTS), max_new_tokens=20, do_sample=False, **options)
    for row, prompt in zip(written, PROMPTS):
        assert row[max(map(len, PROMPTS)) :].tolist() == write_greedily(model, prompt, 20)[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
def test_a_prompt_longer_than_the_table_is_its_end(model, options):
    prompt = torch.randint(3, 64, (30,)).tolist()
    written = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, **options)
    assert written[0].tolist() == write_greedily(model, prompt, 3)


def test_the_window_is_computed_again_only_when_the_table_is_full(model):
    lengths = count_tokens_per_pass(model)
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False)
    assert lengths == [5] + [1] * 7 + [CONTEXT] * 4  # the last token is not read


def test_padding_takes_no_positions(model):
    lengths = count_tokens_per_pass(model)
    written = model.generate(**pad_left(PROMPTS[:2], width=20), max_new_tokens=6, do_sample=False)
    assert lengths == [20] + [1] * 5
    assert written[0, 20:].tolist() == write_greedily(model, PROMPTS[0], 6)[5:]


def test_a_static_cache_has_no_room_for_padding_beyond_the_table(model):
    inputs = pad_left(PROMPTS[:2], width=20)
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert written[0, 20:].tolist() == write_greedily(model, PROMPTS[0], 6)[5:]


def test_sampling_draws_from_the_windows_probabilities(model):
    torch.manual_seed(3)
    written = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=True, top_k=0)
    torch.manual_seed(3)
    tokens = list(PROMPTS[0])
    for _ in range(20):
        tokens.append(int(torch.multinomial(next_logits(model, tokens)[None].softmax(-1), 1)))
    assert written[0].tolist() == tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_past_the_table_are_those_of_a_search_without_cache(model, use_cache):
    beams = [(0.0, PROMPTS[0])]
    for _ in range(14):
        grown = []
        for score, tokens in beams:
            log_probs = next_logits(model, tokens).log_softmax(-1)
            grown += [(score + float(log_prob), [*tokens, token]) for token, log_prob in enumerate(log_probs)]
        beams = sorted(grown, reverse=True)[:3]

    written = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=14,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        use_cache=use_cache,
    )
    assert written.tolist() == [tokens for _, tokens in beams]


def test_embeddings_as_a_prompt_stay_in_the_window_as_long_as_they_belong_there(model):
    prompt = torch.tensor([PROMPTS[2]])
    embeddings = model.get_input_embeddings()(prompt)
    expected = write_greedily(model, PROMPTS[2], 20)
    assert model.generate(inputs_embeds=embeddings, max_new_tokens=20, do_sample=False)[0].tolist() == expected[7:]
    # With both, the ids are only repeated in what comes out.
    both = model.generate(input_ids=prompt + 1, inputs_embeds=embeddings, max_new_tokens=20, do_sample=False)
    assert both[0].tolist() == [*(token + 1 for token in PROMPTS[2]), *expected[7:]]


def test_a_streamer_gets_every_token(model):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    collector = Collector()
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False, streamer=collector)
    assert collector.tokens == [*write_greedily(model, PROMPTS[0], 20), "end"]


def test_the_first_of_several_stop_strings_ends_the_text_past_the_table():
    tokenizer = train_bpe(["the cat sees a dog"] * 9, 270)
    model = make_model(vocab_size=len(tokenizer))
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    options = {"suppress_tokens": sorted(set(range(len(tokenizer))) - letters), "max_new_tokens": 40, "do_sample": True}
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    torch.manual_seed(0)
    whole = model.generate(prompt, **options)[0]
    early, late = (tokenizer.decode(whole[index : index + 3]) for index in (24, 30))
    assert tokenizer.decode(whole).index(early) < tokenizer.decode(whole).index(late)

    torch.manual_seed(0)
    stopped = model.generate(prompt, **options, stop_strings=[late, early], tokenizer=tokenizer)
    assert stopped[0].tolist() == whole[:27].tolist()


@pytest.mark.parametrize("helper", ["an assistant", "an assistant with a smaller table", "prompt lookup"])
@pytest.mark.parametrize("length", [5, 10, 11, 12, 30])
def test_assisted_decoding_continues_alone_past_the_table(model, helper, length):
    prompt = torch.randint(3, 6, (length,)).tolist()
    options = {"prompt_lookup_num_tokens": 4}
    if helper != "prompt lookup":
        # An assistant that agrees as long as its own table reaches.
        table = 8 if helper == "an assistant with a smaller table" else CONTEXT
        assistant = make_model(max_position_embeddings=table)
        state = model.state_dict()
        state["model.embed_positions.weight"] = state["model.embed_positions.weight"][:table]
        assistant.load_state_dict(state)
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0)
        options = {"assistant_model": assistant}
    lengths = count_tokens_per_pass(model)
    written = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, **options)
    assert lengths[-1] == CONTEXT
    assert written[0].tolist() == write_greedily(model, prompt, 20)


def test_proposals_and_their_probabilities_end_together_at_the_table(model, monkeypatch):
    """Speculative sampling takes the number of proposals from the number of their logits."""
    seen = []

    def speculative_sampling(candidate_ids, candidate_logits, candidate_length, *args, **kwargs):
        seen.append((candidate_ids.shape[1], candidate_length, candidate_logits.shape[1]))
        return _speculative_sampling(candidate_ids, candidate_logits, candidate_length, *args, **kwargs)

    monkeypatch.setattr("transformers.generation.utils._speculative_sampling", speculative_sampling)
    assistant = make_model()
    assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0)
    prompt = torch.randint(3, 64, (1, CONTEXT - 2))
    written = model.generate(prompt, max_new_tokens=9, do_sample=True, assistant_model=assistant)
    assert written.shape == (1, CONTEXT + 7)
    assert seen[0] == (CONTEXT, 2, 2)


def test_an_assistant_keeps_the_number_of_tokens_it_proposes(model):
    """transformers lets it grow by 2 whenever all proposals were right: also when there were none."""
    assistant = make_model()
    before = assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    prompt = torch.randint(3, 64, (1, CONTEXT + 1))
    model.generate(prompt, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert assistant.generation_config.num_assistant_tokens == before


def test_a_window_leaves_the_callers_cache_with_the_beginning_of_the_text(model):
    cache = DynamicCache(config=model.config)
    written = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, past_key_values=cache)[
        0
    ].tolist()
    assert cache.get_seq_length() == CONTEXT
    # The user takes back ten tokens and writes two others: all that is left fits the table again.
    shorter = [*written[:7], 50, 51]
    cache.crop(-6)
    again = model.generate(torch.tensor([shorter]), max_new_tokens=2, do_sample=False, past_key_values=cache)
    assert again[0].tolist() == write_greedily(model, shorter, 2)


def test_a_conversation_continues_with_its_cache_past_the_table(model):
    cache = DynamicCache(config=model.config)
    tokens = PROMPTS[0]
    for turn in ([], [33, 34], [35], [36, 37, 38]):
        tokens = [*tokens, *turn]
        expected = write_greedily(model, tokens, 4)
        tokens = model.generate(torch.tensor([tokens]), max_new_tokens=4, do_sample=False, past_key_values=cache)
        tokens = tokens[0].tolist()
        assert tokens == expected


def test_the_window_cannot_be_made_of_tokens_that_were_not_given(model):
    cache = DynamicCache(config=model.config)
    written = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=7, do_sample=False, past_key_values=cache)
    with pytest.raises(ValueError, match=r"only 3 input_ids were given\. Pass those of the cached tokens"):
        model.generate(
            torch.cat([written[:, -1:], torch.tensor([[4, 4]])], dim=1),
            attention_mask=torch.ones(1, 14),
            past_key_values=cache,
            max_new_tokens=2,
        )


def test_positions_that_the_window_cannot_keep_are_refused(model):
    two_documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids do not count"):
        model.generate(torch.tensor([PROMPTS[2]]), position_ids=two_documents, max_new_tokens=20)
    right = pad_left(PROMPTS)
    with pytest.raises(ValueError, match="Pad on the left"):
        model.generate(right["input_ids"], attention_mask=right["attention_mask"].flip(-1), max_new_tokens=20)


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_a_static_cache_that_is_too_small_says_how_large_it_must_be(preset):
    model = make_model(preset, max_position_embeddings=32)
    ids = torch.tensor([PROMPTS[0]])
    small = StaticCache(config=model.config, max_cache_len=10)
    with pytest.raises(ValueError, match=r"room for 10 tokens, and the text has 11\. Make it with max_cache_len="):
        model.generate(ids, max_new_tokens=20, past_key_values=small)
    enough = StaticCache(config=model.config, max_cache_len=24)
    written = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=enough)
    assert written[0].tolist() == write_greedily(model, PROMPTS[0], 20, context=32)


@pytest.mark.parametrize("preset", [pytest.param("modern", marks=pytest.mark.slow), "book"])
def test_a_compiled_decode_with_a_static_cache_goes_past_the_context(preset):
    model = make_model(preset, num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    written = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=12,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    context = CONTEXT if preset == "book" else None
    assert written[0].tolist() == write_greedily(model, PROMPTS[0], 12, context)


ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 6},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 6,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 6,
    },
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_rotary_positions_continue_past_the_context_as_configured(rope_type):
    model = make_model("modern", rope_parameters={"rope_type": rope_type, **ROPE[rope_type]})
    # These two change their frequencies with the length, which does not reach keys that are in a cache already.
    use_cache = rope_type not in ("dynamic", "longrope")
    written = model.generate(**pad_left(PROMPTS), max_new_tokens=20, do_sample=False, use_cache=use_cache)
    for row, prompt in zip(written, PROMPTS):
        if use_cache or len(prompt) == max(map(len, PROMPTS)):
            assert row[-20:].tolist() == write_greedily(model, prompt, 20, context=None)[len(prompt) :]


def test_it_says_once_that_the_window_slides(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    generation_gpt.logger.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False)
    messages = [record.getMessage() for record in caplog.records if record.name == generation_gpt.__name__]
    assert len(messages) == 1
    assert "longer than the model's 12 learned positions" in messages[0]


def test_the_code_that_travels_slides_too(model, tmp_path):
    model.save_pretrained(tmp_path)
    travelled = get_class_from_dynamic_module("modeling_gpt.GPTForCausalLM", tmp_path).from_pretrained(tmp_path)
    assert type(travelled) is not hfllm.GPTForCausalLM
    written = travelled.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False)
    assert written[0].tolist() == write_greedily(model, PROMPTS[0], 20)


def test_a_pipeline_writes_past_the_context():
    tokenizer = train_bpe(["the cat sees a dog"] * 9, 280)
    model = make_model(vocab_size=len(tokenizer))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompt = tokenizer("the cat").input_ids
    text = generator("the cat", max_new_tokens=30, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text == tokenizer.decode(write_greedily(model, prompt, 30)[len(prompt) :], skip_special_tokens=True)
