"""Answers to one request: several jobs at once, until they are done, the time is over or the client has gone."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, NamedTuple

from fastapi import Request

from .errors import ApiError, as_api_error, error_body
from .gate import Limits
from .interface import BLEND, GENERIC, UNKNOWN, USER, Engine, Job, Piece
from .metrics import Metrics


CLIENT_GONE = 499


class Load:
    """
    How many answers are in progress, in all and for each key.

    Args:
        limits ([`Limits`]): How many may be.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of_keys: dict[str, int] = {}

    @contextmanager
    def of(self, key: str, number: int) -> Iterator[None]:
        """
        Count `number` answers of a key while the block runs.

        Raises:
            [`ApiError`]: if there are too many: 429 for the key, 503 for the server.
        """
        retry = {"Retry-After": "1"}
        if self._of_keys.get(key, 0) + number > self._limits.max_answers_per_key:
            message = "Too many answers are in progress for this key. Wait for some of them."
            raise ApiError(429, message, "too_many_requests", headers=retry)
        if sum(self._of_keys.values()) + number > self._limits.max_answers:
            raise ApiError(
                503, "Too many answers are in progress. Try again in a moment.", "overloaded", headers=retry
            )
        self._of_keys[key] = self._of_keys.get(key, 0) + number
        try:
            yield
        finally:
            self._of_keys[key] -= number
            if not self._of_keys[key]:
                del self._of_keys[key]


class Numbered(NamedTuple):
    """A piece of the answer with a number."""

    number: int
    piece: Piece


async def write(engine: Engine, jobs: Sequence[Job], metrics: Metrics) -> AsyncGenerator[Numbered]:
    """The pieces of the answers to all jobs, as they come. Closing it ends the work on them."""
    queue: asyncio.Queue[Numbered | Exception] = asyncio.Queue()

    async def pump(number: int, job: Job) -> None:
        is_first = True
        try:
            async with aclosing(engine.generate(job)) as pieces:
                async for piece in pieces:
                    if is_first:
                        metrics.begun(job, time.monotonic() - job.created)
                        is_first = False
                    metrics.answer_tokens.inc(piece.num_tokens)
                    queue.put_nowait(Numbered(number, piece))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, job)) for number, job in enumerate(jobs)]
    num_left = len(jobs)
    try:
        while num_left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            num_left -= found.piece.finish_reason is not None
            yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: Request, work: Any, seconds: float) -> Any:
    """
    What `work` (a coroutine) returns.

    Raises:
        [`ApiError`]: 504 if it takes longer than `seconds`; 499, which nobody reads, if the client goes before.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        raise as_api_error(TimeoutError()) if not done else ApiError(CLIENT_GONE, "The client has gone.")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(pieces: AsyncGenerator[Numbered], number: int) -> tuple[list[str], list[int], list[str]]:
    """The texts, numbers of tokens and reasons to end of so many answers."""
    texts, tokens, reasons = [""] * number, [0] * number, ["length"] * number
    async with aclosing(pieces):
        async for index, piece in pieces:
            texts[index] += piece.text
            tokens[index] += piece.num_tokens
            reasons[index] = piece.finish_reason or reasons[index]
    return texts, tokens, reasons


async def as_events(
    first: Numbered,
    pieces: AsyncGenerator[Numbered],
    choice: Callable[[int, str, str | None, bool], dict[str, Any]],
    head: dict[str, Any],
    usage: Callable[[list[int]], dict[str, int]] | None,
    num_answers: int,
    seconds_left: float,
) -> AsyncIterator[str]:
    """
    Server-sent events of a stream, whose first piece is there already. An error has no status any more, and is an event too.

    Args:
        first ([`Numbered`]): The piece that is there already.
        pieces (`AsyncIterator`): Those that come.
        choice (`Callable`): The entry of `choices`, of the answer's number, text, reason to end, and whether it is its first.
        head (`dict`): What is in every event.
        usage (`Callable`, *optional*): Numbers of tokens for a last event, of those of each answer.
        num_answers (`int`): How many answers there are.
        seconds_left (`float`): When to give up.
    """
    tokens, begun = [0] * num_answers, set()
    more = {"usage": None} if usage is not None else {}

    def event(index: int, piece: Piece) -> str:
        entry = choice(index, piece.text, piece.finish_reason, index not in begun)
        begun.add(index)
        tokens[index] += piece.num_tokens
        return _event({**head, "choices": [entry], **more})

    try:
        async with asyncio.timeout(seconds_left), aclosing(pieces):
            yield event(*first)
            async for index, piece in pieces:
                if piece.text or piece.finish_reason is not None:
                    yield event(index, piece)
                else:
                    tokens[index] += piece.num_tokens
        if usage is not None:
            yield _event({**head, "choices": [], "usage": usage(tokens)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        told = as_api_error(error)
        yield _event(error_body(told.status, told.message, told.code))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def answered_for(jobs: Sequence[Job]) -> str:
    """
    Whose soft prompts the answers to one request have: all the same, unless users came or went in between.

    ```python
    >>> from trl_personal.serving.interface import Sampling
    >>> answered_for([Job([1], Sampling(1))])
    'generic'
    ```
    """
    found = {job.answered_for for job in jobs}
    return next(name for name in (UNKNOWN, BLEND, USER, GENERIC) if name in found)
