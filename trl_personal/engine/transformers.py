"""The engine: a thread that owns a model, and writes what the event loop asks for."""

import asyncio
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..models.known_users import KnownUsers, set_known_users
from ..models.saving import embedding_size, get_base_model, is_personalized
from ..serving.interface import EngineError, Job, Messages, Piece, RequestError, UserAdmin
from ..user_profile import render_user_profile, require_template
from ..users import UserVocab
from ..writing import encode_prompts
from .batch import Batch, Writer
from .rows import Row


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TOKENS_IN_TURN = 16  # of a batch, where there are several


class TransformersEngine:
    """
    An [`~serving.interface.Engine`] on transformers, for any model that writes with users, and for plain ones.

    One thread owns the model. Between two tokens it lets new rows in, and drops those that are done: a request waits for one
    token of the batch at work, and for the prompts that are read before its own. All settings are a row's own.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With users attached; a plain one writes without.
        tokenizer: The model's tokenizer.
        name (`str`): The name that clients call the model by.
        max_rows (`int`, *optional*, defaults to `64`): The most answers that are written at once.
        max_batch_tokens (`int`, *optional*, defaults to `65536`): The most tokens that they may have together, prompts,
            soft prompts and all that may yet come: it bounds the memory of caches.
        max_prefill_tokens (`int`, *optional*, defaults to `2048`): The most tokens of prompts, padding included, that are read
            between two tokens of a batch. (One prompt may be longer.)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_rows: int = 64,
        max_batch_tokens: int = 65536,
        max_prefill_tokens: int = 2048,
    ) -> None:
        self.name, self.model = name, model.eval()
        self.admin: UserAdmin | None = None
        self.max_rows, self.max_batch_tokens, self.max_prefill_tokens = max_rows, max_batch_tokens, max_prefill_tokens
        self._causal_lm = get_base_model(model)
        self._writer = Writer(model, self._tell)
        self._tokenizer, self._encoding = tokenizer, threading.Lock()
        self._decoder = copy.deepcopy(tokenizer)  # fast tokenizers may not be used while another thread sets them up
        self._vocab = self._causal_lm.user_vocab if is_personalized(model) else UserVocab()
        self._changed = threading.Condition()
        self._new: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_stopping = False
        self._waiting: deque[Row] = deque()  # these three are the thread's own
        self._batches: deque[Batch] = deque()
        self._told: list[tuple[Row, Piece | Exception]] = []
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- What is known of the model ---------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be answered."""
        return self._tokenizer.chat_template is not None

    @property
    def has_profiles(self) -> bool:
        """Whether the model was trained with profiles."""
        return getattr(self._causal_lm, "user_profile_template", None) is not None

    @property
    def max_tokens(self) -> int | None:
        """The model's positions without those of the soft prompt."""
        positions = getattr(self._causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return None if positions is None else positions - self._writer.num_virtual_tokens

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return embedding_size(self._causal_lm.get_input_embeddings())[0]

    @property
    def num_users(self) -> int:
        """The number of known users."""
        return len(self._vocab)

    def knows(self, user_id: str) -> bool:
        """Whether a user has a row."""
        return user_id in self._vocab

    def encode(self, prompt: str | Messages, user_profile: str | None = None) -> list[int]:
        """See [`~serving.interface.Engine.encode`]."""
        try:
            if user_profile is not None:
                template = require_template(getattr(self._causal_lm, "user_profile_template", None))
                prompt = render_user_profile(prompt, user_profile, template, str(self._tokenizer.bos_token or ""))
            with self._encoding:
                encoded = encode_prompts(self._tokenizer, [prompt], use_template=not isinstance(prompt, str))
        except Exception as error:  # a chat template is code of its own, which may raise anything
            raise RequestError(f"The prompt cannot be turned into tokens: {error}") from error
        return encoded["input_ids"][0].tolist()

    def gauges(self) -> Mapping[str, float]:
        """How many answers are being written, in how many batches, and how many wait."""
        batches = list(self._batches)
        return {
            "running": sum(len(batch.rows) for batch in batches),
            "batches": len(batches),
            "waiting": len(self._waiting) + len(self._new),
        }

    # --- In the event loop ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread, after the token that it is at. Answers that are not done fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def generate(self, job: Job) -> AsyncGenerator[Piece]:
        """See [`~serving.interface.Engine.generate`]."""
        row = Row(job, self._decode, self._writer.end_ids)
        with self._changed:
            if self._is_stopping:
                raise EngineError("The engine has stopped.")
            self._new.append(row)
            self._changed.notify()
        try:
            while True:
                piece = await row.queue.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            row.is_cancelled = True

    def call_between_tokens(self, function: Callable[[], Result]) -> Result:
        """Let the engine's thread call a function between two tokens; returns what it returns. For other threads."""
        future: Future[Result] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    def set_users(self, users: KnownUsers) -> None:
        """Other users from the next prompt on. Answers in progress have their soft prompts in their caches already."""
        users.user_model.to(next(self._causal_lm.user_model.parameters()).device)

        def swap() -> None:
            set_known_users(self._causal_lm, users)
            self._vocab = users.user_vocab

        self.call_between_tokens(swap)

    # --- In the thread ----------------------------------------------------------------------------------------------

    def _decode(self, ids: list[int]) -> str:
        return str(self._decoder.decode(ids, skip_special_tokens=True))

    def _tell(self, row: Row, piece: Piece | Exception) -> None:
        self._told.append((row, piece))

    def _hand_over(self) -> None:
        """Give what was told to the event loop, all at once."""
        told, self._told = self._told, []
        if told and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, told)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._new or self._calls or self._waiting or self._batches or self._is_stopping):
                    self._changed.wait()
                if self._is_stopping:
                    break
                self._waiting.extend(self._new)
                self._new.clear()
                calls = list(self._calls)
                self._calls.clear()
            for function, future in calls:
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            self._let_in()
            if self._batches:
                self._turn(self._batches[0])
            self._hand_over()
        for row in [*self._new, *self._waiting, *(row for batch in self._batches for row in batch.rows)]:
            self._tell(row, EngineError("The engine has stopped."))
        for _, future in self._calls:
            future.set_exception(EngineError("The engine has stopped."))
        self._hand_over()

    def _let_in(self) -> None:
        """Read the prompts of the first that wait, as many as there is room for."""
        rows = self._take_waiting()
        if not rows:
            return
        now = time.monotonic()
        for row in rows:
            row.job.started = now
        batch = self._try(rows, lambda: self._writer.begin(rows))
        if batch is None:
            return
        batch.drop_done()
        host = next((other for other in self._batches if batch.rows and other.can_take(batch)), None)
        if host is not None:
            host.take(batch)
        elif batch.rows:
            self._batches.appendleft(batch)

    def _take_waiting(self) -> list[Row]:
        rows: list[Row] = []
        running = [row for batch in self._batches for row in batch.rows]
        num_tokens, longest = sum(map(self._reserved, running)), 0
        while self._waiting and len(running) + len(rows) < self.max_rows:
            row = self._waiting[0]
            if row.is_cancelled:
                self._waiting.popleft()
                continue
            num_tokens += self._reserved(row)
            longest = max(longest, len(row.job.prompt_ids))
            is_first = not rows and not running
            if not is_first and num_tokens > self.max_batch_tokens:
                break
            if rows and longest * (len(rows) + 1) > self.max_prefill_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _reserved(self, row: Row) -> int:
        return len(row.job.prompt_ids) + self._writer.num_virtual_tokens + row.job.sampling.max_tokens

    def _turn(self, batch: Batch) -> None:
        """Write the next tokens of the first batch, until something else is to be done; then it is the last."""
        batch.drop_done()
        if batch.rows:
            num_tokens = min(batch.num_left, TOKENS_IN_TURN) if len(self._batches) > 1 else batch.num_left
            self._try(batch.rows, lambda: self._writer.go_on(batch, num_tokens, lambda: self._is_over(batch)))
            batch.drop_done()
        self._batches.rotate(-1)
        if not batch.rows:
            self._batches.pop()

    def _is_over(self, batch: Batch) -> bool:
        """Whether a batch at work is to stop after this token: something came, or rows are done and room is wanted."""
        self._hand_over()
        num_done = sum(row.is_done for row in batch.rows)
        is_wanted = bool(self._waiting) or num_done * 4 >= len(batch.rows)
        return bool(self._new or self._calls or self._is_stopping) or (num_done > 0 and is_wanted)

    def _try(self, rows: list[Row], write: Callable[[], Result]) -> Result | None:
        """What `write` returns; where it fails, the rows do, and the engine goes on with others."""
        try:
            return write()
        except Exception as error:
            logger.error("The engine failed at %d answers: %s", len(rows), type(error).__name__, exc_info=True)
            for row in rows:
                if not row.is_done:
                    row.is_finished = True
                    self._tell(row, EngineError("The engine failed at this request."))
            return None


def _put(told: list[tuple[Row, Piece | Exception]]) -> None:
    for row, piece in told:
        row.queue.put_nowait(piece)
