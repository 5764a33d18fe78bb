"""One answer in progress: its tokens as text, piece by piece, where it ends, and how its next token is drawn."""

import asyncio
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from ..serving.interface import Job, Piece


HALF_A_CHARACTER = "\ufffd"  # what tokenizers write for bytes that are no whole character (yet)
MOST_BYTE_TOKENS = 16  # more tokens than that are no single character: they are written as they are


class TextStream:
    """
    The text of tokens as they come, in whole characters.

    Tokens are decoded together with those before them, as a space may belong to one or the other.

    Args:
        decode (`Callable`): The text of a list of token ids.

    ```python
    >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    >>> [stream.push(byte) for byte in "é!".encode()], stream.flush()
    (['', 'é', '!'], '')
    ```
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # those of the last piece, and those after it
        self._num_told = 0  # of these, how many are in the text that was told

    def push(self, token_id: int) -> str:
        """What the text has more with this token; nothing while a character is not whole."""
        self._ids.append(token_id)
        new = self._new_text()
        is_whole = not new.endswith(HALF_A_CHARACTER) or len(self._ids) - self._num_told > MOST_BYTE_TOKENS
        if not new or not is_whole:
            return ""
        self._ids = self._ids[self._num_told :]
        self._num_told = len(self._ids)
        return new

    def flush(self) -> str:
        """What is left at the end."""
        return self._new_text()

    def _new_text(self) -> str:
        told = self._decode(self._ids[: self._num_told])
        return self._decode(self._ids)[len(told) :]


class StopTexts:
    """
    Ends a text before the first of some stop texts, and holds back what may be the beginning of one.

    ```python
    >>> stops = StopTexts(["end."])
    >>> stops.push("The e"), stops.push("ar, the end"), stops.push(". More")
    (('The ', False), ('ear, the ', False), ('', True))
    ```
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be told, and whether a stop text was found behind it."""
        text = self._held + text
        found = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that `stop` begins with, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Row:
    """
    One answer in progress. The event loop makes it and takes its pieces; everything else happens in the engine's thread.

    Args:
        job ([`~serving.interface.Job`]): What to write.
        decode (`Callable`): The text of a list of token ids.
        end_ids (`set[int]`): Tokens with which the model ends an answer.
    """

    def __init__(self, job: Job, decode: Callable[[list[int]], str], end_ids: AbstractSet[int]) -> None:
        self.job = job
        self.queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.is_cancelled = False  # set by the event loop, when nobody waits for the answer
        self.is_finished = False
        self.num_tokens = 0
        self._stream, self._stops, self._end_ids = TextStream(decode), StopTexts(job.sampling.stop), end_ids
        self.generator = torch.Generator()
        if job.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(job.sampling.seed)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to write."""
        return self.is_finished or self.is_cancelled

    @property
    def num_left(self) -> int:
        """How many tokens there may be yet."""
        return self.job.sampling.max_tokens - self.num_tokens

    def accept(self, token_id: int) -> Piece:
        """The piece that the next token makes."""
        self.num_tokens += 1
        ends = token_id in self._end_ids
        text, is_stopped = self._stops.push("" if ends else self._stream.push(token_id))
        is_last = ends or self.num_left <= 0
        if is_last and not is_stopped:
            more, is_stopped = self._stops.push(self._stream.flush())
            text += more if is_stopped else more + self._stops.flush()
        self.is_finished = is_stopped or is_last
        reason = "stop" if is_stopped or ends else "length"
        return Piece(text, 1, reason if self.is_finished else None)


class DrawnPerRow(LogitsProcessor):
    """
    Lets each row of a greedy search have its own temperature, `top_p` and random numbers, so that all share a batch.

    The likeliest token after noise from a Gumbel distribution was added to log-probabilities is a sample from them. A row of
    temperature 0 gets no noise.

    Args:
        rows (`list[Row]`): The rows of the batch, in its order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `(batch, vocab_size)` whose largest entry in a row is the token drawn for it."""
        settings: dict[tuple[float, float], list[int]] = {}
        for number, row in enumerate(self._rows):
            if row.job.sampling.temperature > 0 and not row.is_done:
                settings.setdefault((row.job.sampling.temperature, row.job.sampling.top_p), []).append(number)
        if not settings:
            return scores
        scores = scores.clone()
        for (temperature, top_p), numbers in settings.items():
            warped = TemperatureLogitsWarper(temperature)(input_ids[numbers], scores[numbers])
            if top_p < 1:
                warped = TopPLogitsWarper(top_p)(input_ids[numbers], warped)
            noise = [torch.empty(scores.shape[1]).exponential_(generator=self._rows[n].generator) for n in numbers]
            scores[numbers] = warped - torch.stack(noise).log().to(warped)
        return scores
