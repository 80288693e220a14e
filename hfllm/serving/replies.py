"""Replies by `model.generate`, a few tokens at a time, so that several clients are answered side by side.

Every reply has its own tokens, cache and random state, and one thread generates some tokens of each in turn. So a reply
has the tokens that `generate` gives for its prompt alone, whatever other clients do, and a seed gives the same reply
again. That is why transformers' continuous batching is not used: its requests share one random state, and it has
neither stop strings nor penalties. The cost is throughput: N clients share the speed of one. To serve many people,
export the model (`recipes/export.py`) and serve it with vLLM or llama.cpp.
"""

import asyncio
import contextlib
import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..data.conversations import Messages
from ..data.instruction import encode_prompt, fit_messages, padding_token_id
from ..model.generation_gpt import CACHE_NAME
from ..tokenization import TURN_END_TOKEN
from .text import LONE_SURROGATE, TextStream


logger = logging.getLogger(__name__)

TOKENS_IN_TURN = 8  # tokens of a reply before it is the next one's turn
LOWEST_TEMPERATURE = 1e-4  # below, logits divided by it overflow


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are chosen, and when it ends. At temperature 0 the likeliest token is taken."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_top_logprobs: int | None = None  # likeliest tokens to report beside each token; None reports no probabilities


class ReplyToken(NamedTuple):
    """A token of a reply and the log-probabilities at its place, before temperature, penalties and biases."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities
    start: int  # number of characters of the reply before it


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the model's own, and the end of a turn for our own tokenizers."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own] if own is not None else [tokenizer.eos_token_id])
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END_TOKEN)
    if turn_end is not None and turn_end != tokenizer.unk_token_id:
        ids.add(turn_end)
    return sorted(ids)


def context_length(model: PreTrainedModel) -> int:
    """The most tokens of prompt and reply together; 2**30 for a model that has no limit."""
    return getattr(model.config, "max_position_embeddings", None) or 2**30


def encode_messages(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt's token ids.

    Raises:
        ValueError: a message is not valid Unicode, or the model's chat template has no place for it.
    """
    with _refusals_explained(messages):
        return encode_prompt(messages, tokenizer)


def encode_newest(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int
) -> tuple[Messages, list[int]]:
    """The newest messages that fit into a number of tokens, see `fit_messages`, and the prompt's token ids.

    Raises:
        ValueError: as in `encode_messages`; or the last message alone is too long.
    """
    with _refusals_explained(messages):
        kept, prompt_ids, _ = fit_messages(messages, tokenizer, max_prompt_length=max_prompt_length)
        return kept, prompt_ids


@contextlib.contextmanager
def _refusals_explained(messages: Messages) -> Iterator[None]:
    for message in messages:
        check_text(message["content"])
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"The model's chat template refuses these messages: {error}.") from error


def check_text(text: str) -> None:
    """Raise a ValueError for half of a surrogate pair, which is not a character."""
    if lone := LONE_SURROGATE.search(text):
        raise ValueError(
            f"The text is not valid Unicode: character {lone.start() + 1:,} is half of a surrogate pair, "
            f"{lone.group()!a}. Send the whole pair, or leave it out."
        )


class Reply:
    """One reply, written by `advance` until `finish_reason` is "stop" or "length".

    `on_text` is called with each piece of text as soon as it is final.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ):
        self.model = model
        self.sampling = sampling
        self.on_text = on_text
        self.is_cancelled = is_cancelled
        self.finish_reason: str | None = None
        self.num_tokens = 0  # with the token that ended the reply
        self.tokens: list[ReplyToken] = []  # if probabilities are asked for; without the token that ended the reply
        self.stream = TextStream(tokenizer, prompt_ids=prompt_ids, stop=sampling.stop)
        self._ids = torch.tensor([list(prompt_ids)], device=model.device)  # (1, T)
        self._cache: Any = None
        self._random_state: torch.Tensor | None = None
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._config = self._generation_config(padding_token_id(tokenizer))
        self._bias = _Bias(sampling, num_prompt_tokens=len(prompt_ids))

    def _generation_config(self, pad_token_id: int) -> Any:
        """The model's own, with this reply's choices."""
        config = copy.deepcopy(self.model.generation_config)
        is_drawn = self.sampling.temperature > 0
        config.update(
            eos_token_id=self._stop_ids,
            pad_token_id=pad_token_id,
            do_sample=is_drawn,
            temperature=float(self.sampling.temperature) if is_drawn else None,  # transformers rejects an int
            top_p=float(self.sampling.top_p) if is_drawn else None,
            top_k=0 if is_drawn else None,
            return_dict_in_generate=True,
            # Options that do not work a few tokens at a time, or that this class handles itself:
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            cache_implementation=None,
            max_length=None,
            stop_strings=None,
        )
        return config

    def advance(self, max_tokens: int | None = None) -> None:
        """Generate up to this many tokens, by default all that are left."""
        left = self.sampling.max_new_tokens - self.num_tokens
        self._config.max_new_tokens = left if max_tokens is None else min(left, max_tokens)
        self._enter_random_state()
        output = self.model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            generation_config=self._config,
            **{CACHE_NAME: self._cache},
            logits_processor=[self._bias],
            stopping_criteria=[_Follow(self)],
        )
        self._leave_random_state()
        self._ids, self._cache = output.sequences, getattr(output, CACHE_NAME)
        if self.finish_reason is not None:
            self.end()

    def end(self) -> None:
        """Return the text that was held back."""
        if (piece := self.stream.end()) and self.on_text is not None:
            self.on_text(piece)

    def take(self, token_id: int) -> bool:
        """Receive a new token; returns whether the reply ends with it."""
        self.num_tokens += 1
        if token_id in self._stop_ids:
            self.finish_reason = "stop"
            return True
        if self.sampling.num_top_logprobs is not None:
            self.tokens.append(self._describe(token_id))
        if (piece := self.stream.put(token_id)) and self.on_text is not None:
            self.on_text(piece)
        if self.stream.is_stopped:
            self.tokens = [token for token in self.tokens if token.start < len(self.stream.text)]
            self.finish_reason = "stop"
        elif self.num_tokens == self.sampling.max_new_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def take_tokens(self) -> list[ReplyToken]:
        """The described tokens whose text is final, each once."""
        is_ended = self.finish_reason is not None
        final = [token for token in self.tokens if is_ended or token.start < len(self.stream.text)]
        self.tokens = self.tokens[len(final) :]
        return final

    def _describe(self, token_id: int) -> ReplyToken:
        logprobs = self._bias.logits[0].float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.sampling.num_top_logprobs or 0, len(logprobs)))
        return ReplyToken(
            token_id, logprobs[token_id].item(), list(zip(ids.tolist(), values.tolist())), self.stream.num_characters
        )

    # torch's random state belongs to the process. A reply sets its own, so that its samples depend on its seed alone:
    # they are the same as with `torch.manual_seed(seed)` and one call of `generate`.

    def _enter_random_state(self) -> None:
        if self.sampling.temperature == 0:
            return
        if self._random_state is None:
            torch.manual_seed(self.sampling.seed)
        elif self.model.device.type == "cpu":
            torch.set_rng_state(self._random_state)
        else:
            torch.get_device_module(self.model.device).set_rng_state(self._random_state)

    def _leave_random_state(self) -> None:
        if self.sampling.temperature == 0:
            return
        on_cpu = self.model.device.type == "cpu"
        self._random_state = (torch if on_cpu else torch.get_device_module(self.model.device)).get_rng_state()


class _Follow(StoppingCriteria):
    """Passes each new token to the reply, and ends `generate` with the reply, or when its client has left."""

    def __init__(self, reply: Reply):
        self.reply = reply

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        is_last = self.reply.take(int(input_ids[0, -1])) or self.reply.is_cancelled()
        return torch.tensor([is_last], device=input_ids.device)


class _Bias(LogitsProcessor):
    """OpenAI's penalties and biases; keeps the logits without them."""

    def __init__(self, sampling: Sampling, *, num_prompt_tokens: int):
        self.sampling = sampling
        self.num_prompt_tokens = num_prompt_tokens
        self.logits = torch.empty(0)  # (1, V), at the place of the newest token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        if self.sampling.frequency_penalty or self.sampling.presence_penalty:
            ids, times = input_ids[0, self.num_prompt_tokens :].unique(return_counts=True)
            penalty = self.sampling.frequency_penalty * times + self.sampling.presence_penalty
            scores = scores.index_add(1, ids, -penalty[None].to(scores.dtype))
        if self.sampling.logit_bias:
            ids = torch.tensor(list(self.sampling.logit_bias), device=scores.device)
            values = torch.tensor([list(self.sampling.logit_bias.values())], dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(1, ids, values)
        return scores


class QueueIsFull(Exception):
    """More clients wait than there is room for."""


class ServerIsClosing(Exception):
    """The server is closing, and writes no further reply."""


@dataclass(eq=False)  # two clients may send the same request
class Job:
    """The replies to one prompt, one after another. All callbacks run in the writer's thread."""

    prompt_ids: Sequence[int]
    choices: Sequence[Sampling]  # one for each reply
    on_text: Callable[[int, str, Reply], None]  # the number of the reply, a piece of its text
    on_end: Callable[[int, Reply], None]  # the number of the reply
    on_error: Callable[[Exception], None]
    is_cancelled: bool = False
    number: int = 0  # of the reply being written
    reply: Reply | None = None


class ReplyWriter:
    """One thread that writes the replies of several clients, some tokens each in turn, in order of arrival.

    At most `max_active` replies have a cache in memory at a time; up to `max_waiting` further clients wait.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_active: int = 8,
        max_waiting: int = 120,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.max_active = max_active
        self.max_waiting = max_waiting
        self.is_closed = False
        self._active: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        # Reentrant: a signal's handler closes the writer in the thread that may be submitting a job.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._work, name="replies", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue the job.

        Raises:
            QueueIsFull: too many clients wait already.
            ServerIsClosing: `close` was called.
        """
        with self._changed:
            if self.is_closed:
                raise ServerIsClosing
            if len(self._waiting) >= self.max_waiting:
                raise QueueIsFull
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job whose client has left; if it is being written, at its next token."""
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """End every job with ServerIsClosing, and accept no more. Returns at once."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._active or self._waiting or self.is_closed):
                    self._changed.wait()
                if self.is_closed:
                    left = [*self._active, *self._waiting]
                    self._active.clear()
                    self._waiting.clear()
                    break
                while self._waiting and len(self._active) < self.max_active:
                    self._active.append(self._waiting.popleft())
                job = self._active[0]
            is_done = job.is_cancelled or self._advance(job)
            with self._changed:
                self._active.rotate(-1)
                if is_done or job.is_cancelled:
                    self._active.remove(job)
        for job in left:
            _call(job, job.on_error, ServerIsClosing())

    def _advance(self, job: Job) -> bool:
        """Write some tokens of a job; returns whether it is done."""
        try:
            if job.reply is None:
                job.reply = self._begin(job, job.number)
            job.reply.advance(TOKENS_IN_TURN)
            if job.reply.finish_reason is None:
                return False
        except Exception as error:  # any failure: other clients are still served
            # Only its type and place: a message may hold the client's text.
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_name}, line {place.tb_lineno}" if place is not None else "?"
            logger.error("A reply failed: %s in %s", type(error).__name__, where)
            _call(job, job.on_error, error)
            return True
        _call(job, job.on_end, job.number, job.reply)
        job.number += 1
        job.reply = None
        return job.number == len(job.choices)

    def _begin(self, job: Job, number: int) -> Reply:
        reply = Reply(
            self.model,
            self.tokenizer,
            job.prompt_ids,
            job.choices[number],
            is_cancelled=lambda: job.is_cancelled or self.is_closed,
        )
        reply.on_text = lambda piece: _call(job, job.on_text, number, piece, reply)
        return reply


class JobEvents:
    """A job whose events are awaited in an event loop: it is submitted at once, and cancelled when its client leaves.

    `get` gives (number of the reply, a piece of its text, tokens), and last for each reply (number, Reply, tokens); the
    tokens are those whose text is final since, if their probabilities are asked for.

    Raises:
        QueueIsFull, ServerIsClosing: see `ReplyWriter.submit`.
    """

    def __init__(self, writer: ReplyWriter, prompt_ids: Sequence[int], choices: Sequence[Sampling]):
        self.writer = writer
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Any) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job = Job(
            prompt_ids,
            choices,
            on_text=lambda number, piece, reply: put((number, piece, reply.take_tokens())),
            on_end=lambda number, reply: put((number, reply, reply.take_tokens())),
            on_error=put,
        )
        writer.submit(self.job)

    async def get(self) -> tuple[int, Any, list[ReplyToken]]:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.writer.cancel(self.job)


def _call(job: Job, callback: Callable[..., None], *arguments: Any) -> None:
    """Call a job's callback, unless its client has left or can no longer be reached."""
    if job.is_cancelled:
        return
    try:
        callback(*arguments)
    except RuntimeError:  # its event loop is closed
        job.is_cancelled = True
