import logging
import queue
import threading

import pytest
import torch

from hfllm.serving import replies
from hfllm.serving.replies import (
    Job,
    QueueIsFull,
    Reply,
    ReplyWriter,
    Sampling,
    ServerIsClosing,
    encode_messages,
    stop_token_ids,
)


PROMPTS = [[0, 40, 50, 60], [0, 70], list(range(30, 60)), [0, 99, 98, 97, 96]]


def generate(model, tokenizer, prompt: list[int], **choice) -> list[int]:
    """The new tokens of transformers' own `generate`, called once."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": stop_token_ids(model, tokenizer), "pad_token_id": 2, **choice}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


class Client:
    """Submits a job, and collects what comes back."""

    def __init__(self, writer: ReplyWriter, prompt: list[int], *choices: Sampling):
        self.events: queue.Queue = queue.Queue()
        self.ids: list[list[int]] = [[] for _ in choices]
        self.writer = writer
        self.job = Job(
            prompt,
            choices,
            on_text=lambda number, piece, reply: self.events.put((number, piece)),
            on_end=lambda number, reply: self.events.put((number, reply)),
            on_error=self.events.put,
        )
        writer.submit(self.job)

    def wait(self) -> list[Reply]:
        ended = []
        while len(ended) < len(self.ids):
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            if isinstance(event[1], Reply):
                ended.append(event[1])
        return ended


def tokens(reply: Reply, prompt: list[int]) -> list[int]:
    return reply._ids[0, len(prompt) :].tolist()


def test_replies_side_by_side_have_the_tokens_of_generate(model, tokenizer, writer):
    clients = [Client(writer, prompt, Sampling(20)) for prompt in PROMPTS]
    for client, prompt in zip(clients, PROMPTS):
        (reply,) = client.wait()
        assert tokens(reply, prompt) == generate(model, tokenizer, prompt, max_new_tokens=20)
        assert reply.finish_reason == "length" and reply.num_tokens == 20


def test_draws_side_by_side_are_those_of_generate_with_that_seed(model, tokenizer, writer):
    sampling = [Sampling(20, temperature=t, top_p=p, seed=7 + t) for t, p in ((1, 1.0), (2, 0.9), (5, 1.0), (1, 0.5))]
    clients = [Client(writer, prompt, each) for prompt, each in zip(PROMPTS, sampling)]
    written = [client.wait()[0] for client in clients]
    for reply, prompt, each in zip(written, PROMPTS, sampling):
        torch.manual_seed(each.seed)
        choice = {"do_sample": True, "temperature": float(each.temperature), "top_p": each.top_p, "top_k": 0}
        assert tokens(reply, prompt) == generate(model, tokenizer, prompt, max_new_tokens=20, **choice)


def test_a_models_own_settings_hold(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    reply = Reply(model, tokenizer, PROMPTS[0], Sampling(30))
    while reply.finish_reason is None:
        reply.advance(4)
    assert tokens(reply, PROMPTS[0]) == generate(model, tokenizer, PROMPTS[0], max_new_tokens=30)


@torch.no_grad()
def test_penalties_and_biases_are_openais(model, tokenizer):
    """logit - frequency_penalty * times - presence_penalty * (times > 0) + bias, of what the reply has so far."""
    bias = {77: 1.5, 99: -100.0}
    sampling = Sampling(25, frequency_penalty=0.7, presence_penalty=0.4, logit_bias=bias)
    reply = Reply(model, tokenizer, PROMPTS[0], sampling)
    reply.advance()

    expected: list[int] = []
    for _ in range(25):
        logits = model(torch.tensor([PROMPTS[0] + expected]), use_cache=False).logits[0, -1]
        for token_id in range(len(logits)):
            times = expected.count(token_id)
            logits[token_id] += bias.get(token_id, 0.0) - 0.7 * times - 0.4 * (times > 0)
        logits[model.generation_config.suppress_tokens] = -torch.inf
        expected.append(int(logits.argmax()))
    assert tokens(reply, PROMPTS[0]) == expected
    assert expected != generate(model, tokenizer, PROMPTS[0], max_new_tokens=25)


@torch.no_grad()
def test_log_probabilities_are_the_models(model, tokenizer):
    reply = Reply(model, tokenizer, PROMPTS[0], Sampling(10, temperature=3.0, seed=1, num_top_logprobs=2))
    reply.advance()
    written = tokens(reply, PROMPTS[0])
    logits = model(torch.tensor([PROMPTS[0] + written]), use_cache=False).logits[0, len(PROMPTS[0]) - 1 : -1]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    expected = logits.log_softmax(-1)
    assert [token.token_id for token in reply.tokens] == written
    for place, token in enumerate(reply.tokens):
        assert token.logprob == pytest.approx(expected[place, written[place]].item(), abs=1e-4)
        best = expected[place].topk(2)
        assert [token_id for token_id, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_reply_ends_at_a_stop_string_and_reports_no_token_behind_it(model, tokenizer):
    whole = Reply(model, tokenizer, PROMPTS[0], Sampling(30, num_top_logprobs=0))
    whole.advance()
    stop = whole.stream.text[10:13]
    cut = Reply(model, tokenizer, PROMPTS[0], Sampling(30, stop=(stop,), num_top_logprobs=0))
    cut.advance()
    assert cut.finish_reason == "stop"
    assert cut.stream.text == whole.stream.text[: whole.stream.text.index(stop)]
    assert all(token.start < len(cut.stream.text) for token in cut.tokens)
    assert 0 < len(cut.tokens) < len(whole.tokens)


def test_a_reply_ends_with_its_turn(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    reply = Reply(model, tokenizer, PROMPTS[0], Sampling(30))
    assert not reply.take(PROMPTS[0][1])
    assert reply.take(end)
    assert (reply.finish_reason, reply.num_tokens) == ("stop", 2)


def test_nobody_waits_for_the_end_of_another_reply(model, tokenizer, writer):
    long = Client(writer, [0, 40], Sampling(120))
    short = Client(writer, [0, 50], Sampling(4))
    short.wait()
    assert not any(isinstance(event[1], Reply) for event in list(long.events.queue))
    long.wait()


def test_a_client_that_leaves_ends_its_reply_and_leaves_its_place(model, tokenizer, writer, monkeypatch):
    gone = Client(writer, [0, 40], *[Sampling(120)] * 1000)
    gone.events.get(timeout=60)  # it is being written
    writer.cancel(gone.job)
    Client(writer, [0, 50], Sampling(20)).wait()
    with writer._changed:
        assert gone.job not in writer._active
    num_events = gone.events.qsize()
    Client(writer, [0, 50], Sampling(20)).wait()
    assert gone.events.qsize() == num_events


def test_the_queue_has_an_end_and_who_leaves_it_makes_room(model, tokenizer):
    writer = ReplyWriter(model, tokenizer, max_active=1, max_waiting=2)
    try:
        first = Client(writer, [0, 40], *[Sampling(120)] * 1000)
        first.events.get(timeout=60)
        second, _third = (Client(writer, [0, 40], Sampling(4)) for _ in range(2))
        with pytest.raises(QueueIsFull):
            Client(writer, [0, 40], Sampling(4))
        writer.cancel(second.job)
        fourth = Client(writer, [0, 40], Sampling(4))
        writer.cancel(first.job)
        assert fourth.wait()[0].num_tokens == 4
    finally:
        writer.close()
        writer.join(30)


def test_closing_ends_every_reply_at_once(model, tokenizer):
    writer = ReplyWriter(model, tokenizer, max_active=1)
    clients = [Client(writer, [0, 40], *[Sampling(120)] * 1000) for _ in range(3)]
    clients[0].events.get(timeout=60)
    writer.close()
    writer.join(30)
    assert not writer._thread.is_alive()
    for client in clients:
        with pytest.raises(ServerIsClosing):
            client.wait()
    with pytest.raises(ServerIsClosing):
        Client(writer, [0, 40], Sampling(4))


def test_a_reply_that_fails_fails_alone_and_its_text_is_not_logged(model, tokenizer, writer, caplog):
    caplog.set_level(logging.DEBUG, logger=replies.__name__)
    with pytest.raises(ValueError, match="12345"):
        Client(writer, [0, 12345], Sampling(4)).wait()  # no id of this vocabulary
    assert Client(writer, [0, 40], Sampling(4)).wait()[0].num_tokens == 4
    assert "A reply failed: ValueError in _embed" in caplog.text
    assert "12345" not in caplog.text


def test_a_writer_can_be_closed_by_a_signal_while_a_job_is_submitted(model, tokenizer):
    """A handler runs in the thread that holds the lock: with a lock that is not reentrant it would wait for itself."""
    writer = ReplyWriter(model, tokenizer)
    with writer._changed:
        closing = threading.Event()
        writer.close()
        closing.set()
    writer.join(30)
    assert closing.is_set() and not writer._thread.is_alive()


def test_messages_that_are_not_text_or_that_the_template_refuses_are_an_error_in_words(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"character 4 is half of a surrogate pair, '\\ud800'"):
        encode_messages([{"role": "user", "content": "abc\ud800"}], tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('one turn only') }}")
    with pytest.raises(ValueError, match="The model's chat template refuses these messages: one turn only"):
        encode_messages([{"role": "user", "content": "abc"}], tokenizer)
