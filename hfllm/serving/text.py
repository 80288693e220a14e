"""Text from token ids, piece by piece, cut exactly at stop strings."""

import re
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # not a character; Python reads a byte that is not UTF-8 as one

# A character of UTF-8 has at most four bytes, so a character that is still incomplete has at most three tokens.
LONGEST_INCOMPLETE = 3
INCOMPLETE = "\ufffd"  # how a tokenizer decodes the bytes of an incomplete character


class TextStream:
    """The text of one reply, which grows token by token and ends at the first stop string.

    `put` returns only text that is final: it holds back an incomplete character, and text that may turn out to be the
    beginning of a stop string. If there are two stop strings, the one that is complete first ends the text. The stop
    string itself is left out unless `keep_stop` is set. `prompt_ids` are the tokens before the reply: some tokenizers
    write the first token of a text without its leading space.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        keep_stop: bool = False,
    ):
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.keep_stop = keep_stop
        self.text = ""  # all that was returned so far
        self.is_stopped = False
        self.num_characters = 0  # decoded so far, with what is held back
        self._before = list(prompt_ids[-LONGEST_INCOMPLETE - 1 :])  # decoded already, but needed to decode the next
        self._new: list[int] = []
        self._held = ""  # the beginning of a stop string, perhaps

    def put(self, token_id: int) -> str:
        """Add a token, and return the text that is final with it."""
        if self.is_stopped:
            return ""
        self._new.append(token_id)
        return self._release(self._decode_new())

    def end(self) -> str:
        """Return the rest of the text, without a last character that lacks some of its bytes."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._before + self._new)[len(self._decode(self._before)) :]
        self._new = []
        piece = self._release(rest.rstrip(INCOMPLETE))
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_new(self) -> str:
        """The characters that the newest token completes."""
        certain = len(self._new)
        text = self._decode(self._before + self._new)
        if text.endswith(INCOMPLETE):
            certain -= LONGEST_INCOMPLETE
            if certain <= 0:
                return ""
            text = self._decode(self._before + self._new[:certain])
        piece = text[len(self._decode(self._before)) :]
        if piece:
            self._before, self._new = self._new[:certain], self._new[certain:]
        return piece

    def _release(self, piece: str) -> str:
        """The final part of the text held back and this piece."""
        self.num_characters += len(piece)
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.is_stopped = True
            self._held = ""
            text = text[: end if self.keep_stop else start]
        else:
            held = self._length_of_a_beginning(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text

    def _length_of_a_beginning(self, text: str) -> int:
        """The number of last characters that may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            ending = text[-length:]
            if any(stop.startswith(ending) for stop in self.stop):
                return length
        return 0


class FollowTexts(StoppingCriteria):
    """Passes `generate`'s new tokens to a TextStream per row, and ends a row at its stop string.

    `on_text` is called with each piece of text. Call `end` when `generate` has returned.
    """

    def __init__(self, streams: Sequence[TextStream], *, on_text: Callable[[str], None] | None = None):
        self.streams = streams
        self.on_text = on_text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for stream, token_id in zip(self.streams, input_ids[:, -1].tolist(), strict=True):
            self._hand_on(stream.put(token_id))
        return torch.tensor([stream.is_stopped for stream in self.streams], device=input_ids.device)

    def end(self) -> None:
        for stream in self.streams:
            self._hand_on(stream.end())

    def _hand_on(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(piece)
