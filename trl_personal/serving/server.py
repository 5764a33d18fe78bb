"""The routes: OpenAI's for answers, and ours for users."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from .answers import Load, answered_for, as_events, collect, unless_gone, write
from .errors import ApiError, add_error_handlers
from .gate import Gate, Limits
from .interface import Engine, Job, Messages, Sampling, UserAdmin
from .keys import ANYBODY, Key, KeyFile
from .metrics import Metrics
from .schemas import AnswerRequest, ChatRequest, CompletionRequest, ErrorBody, JoinRequest, UpdateRequest, UsersRequest


logger = logging.getLogger(__name__)

ANSWERED_FOR = "x-answered-for"


def create_app(engine: Engine, keys: KeyFile | None = None, limits: Limits | None = None) -> FastAPI:
    """
    The server as an ASGI application; [`~serving.run.run_server`] runs it.

    Args:
        engine ([`~serving.interface.Engine`]): Writes the answers. It is started and stopped with the application.
        keys ([`KeyFile`], *optional*): Without, everybody may ask for every user, and nobody may change users.
        limits ([`Limits`], *optional*): Defaults to those of [`Limits`].
    """
    limits = limits or Limits()
    server = Server(engine, keys, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    def bodies(statuses: Sequence[int]) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": ErrorBody} for status in statuses}

    app = FastAPI(title="trl-personal", docs_url=None, redoc_url=None, lifespan=lifespan)
    for path, methods, function, statuses in server.routes():
        app.add_api_route(path, function, methods=methods, responses=bodies(statuses), response_model=None)
    add_error_handlers(app)
    app.add_middleware(Gate, limits=limits, metrics=server.metrics, keys=keys)
    return app


class Server:
    """
    What is behind the routes.

    Args:
        engine ([`~serving.interface.Engine`]), keys ([`KeyFile`], *optional*), limits ([`Limits`]): See [`create_app`].
    """

    def __init__(self, engine: Engine, keys: KeyFile | None, limits: Limits) -> None:
        self.engine, self.keys, self.limits = engine, keys, limits
        self.metrics, self.load = Metrics(engine), Load(limits)
        self.changing = asyncio.Lock()
        self.created = int(time.time())

    def routes(self) -> list[tuple[str, list[str], Callable[..., Any], tuple[int, ...]]]:
        """Path, methods, function, and the statuses of its errors."""

        async def find(authorization: Annotated[str | None, Header()] = None) -> Key:
            return self.find_key(authorization)

        async def find_admin(authorization: Annotated[str | None, Header()] = None) -> Key:
            found = self.find_key(authorization)
            if not found.is_admin:
                raise ApiError(403, "Users are changed with the key of an administrator (`trl-personal key --admin`).")
            return found

        async def chat(body: ChatRequest, request: Request, key: Annotated[Key, Depends(find)]) -> Response:
            """Answer a conversation, as OpenAI's route of this name does."""
            return await self.chat(body, request, key)

        async def complete(body: CompletionRequest, request: Request, key: Annotated[Key, Depends(find)]) -> Response:
            """Go on with a text, as OpenAI's route of this name does."""
            return await self.complete(body, request, key)

        async def models(key: Annotated[Key, Depends(find)]) -> Response:
            """The one model there is."""
            return JSONResponse({"object": "list", "data": [self.model_card()]})

        async def health() -> Response:
            """Whether the server can answer."""
            alive = self.engine.is_alive
            return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

        async def metrics(key: Annotated[Key, Depends(find)]) -> Response:
            """Numbers for Prometheus."""
            return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

        async def join(body: JoinRequest, key: Annotated[Key, Depends(find_admin)]) -> Response:
            """Let users join by their pairs."""
            rows = [pair.row() for pair in body.pairs]
            return JSONResponse(await self.change(lambda admin: admin.add_users(rows, body.user_ids)))

        async def update(body: UpdateRequest, key: Annotated[Key, Depends(find_admin)]) -> Response:
            """Refine users by more pairs."""
            rows = [pair.row() for pair in body.pairs]
            return JSONResponse(await self.change(lambda admin: admin.update_users(rows)))

        async def remove(body: UsersRequest, key: Annotated[Key, Depends(find_admin)]) -> Response:
            """Forget users."""
            return JSONResponse(await self.change(lambda admin: admin.remove_users(body.user_ids)))

        async def export(body: UsersRequest, key: Annotated[Key, Depends(find_admin)]) -> Response:
            """The rows of users, as a file for `trl-personal users import`."""
            content = await self.change(lambda admin: admin.export_users(body.user_ids))
            return Response(content, media_type="application/octet-stream")

        refused = (400, 401, 403, 408, 413)
        busy = (404, 429, 500, 503, 504)
        return [
            ("/v1/chat/completions", ["POST"], chat, (*refused, *busy)),
            ("/v1/completions", ["POST"], complete, (*refused, *busy)),
            ("/v1/models", ["GET"], models, (401,)),
            ("/health", ["GET"], health, (503,)),
            ("/metrics", ["GET"], metrics, (401,)),
            ("/v1/users/join", ["POST"], join, (*refused, 500, 501)),
            ("/v1/users/update", ["POST"], update, (*refused, 500, 501)),
            ("/v1/users/remove", ["POST"], remove, (*refused, 500, 501)),
            ("/v1/users/export", ["POST"], export, (*refused, 500, 501)),
        ]

    def find_key(self, authorization: str | None) -> Key:
        """
        The key of a request.

        Raises:
            [`ApiError`]: 401 if there is none, or it is not in the file.
        """
        if self.keys is None:
            return ANYBODY
        key = self.keys.find_in_header(authorization or "")
        if key is None:
            message = "The request needs an API key that this server knows, as `Authorization: Bearer KEY`."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key

    def model_card(self) -> dict[str, Any]:
        """The entry of `/v1/models`."""
        return {"id": self.engine.name, "object": "model", "created": self.created, "owned_by": "trl-personal"}

    async def chat(self, body: ChatRequest, request: Request, key: Key) -> Response:
        """The answer to a conversation."""
        if not self.engine.has_chat_template:
            raise ApiError(400, "The model has no chat template. Use `/v1/completions`.", param="messages")
        messages = [message.plain() for message in body.messages]

        def choice(index: int, text: str, reason: str | None, is_first: bool) -> dict[str, Any]:
            delta = {"role": "assistant", "content": text} if is_first else {"content": text}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

        def whole(index: int, text: str, reason: str) -> dict[str, Any]:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

        return await self.answer(body, request, key, [messages], "chat.completion", choice, whole)

    async def complete(self, body: CompletionRequest, request: Request, key: Key) -> Response:
        """The text that goes on."""

        def choice(index: int, text: str, reason: str | None, is_first: bool = True) -> dict[str, Any]:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

        return await self.answer(body, request, key, body.prompts, "text_completion", choice, choice)

    async def answer(
        self,
        body: AnswerRequest,
        request: Request,
        key: Key,
        prompts: Sequence[str | list[int] | Messages],
        kind: str,
        choice: Callable[..., dict[str, Any]],
        whole: Callable[..., dict[str, Any]],
    ) -> Response:
        """The response to a request for answers to `prompts`, streamed or not."""
        self._check(body, key)
        deadline = time.monotonic() + self.limits.max_seconds
        num_answers = body.n or 1
        async with AsyncExitStack() as stack:
            stack.enter_context(self.load.of(key.name, num_answers * len(prompts)))
            encoded = [await self._encode(prompt, body.user_profile) for prompt in prompts]
            jobs = [
                Job(ids, self._sampling(body, ids, number), body.users or body.user, body.user_strength)
                for ids in encoded
                for number in range(num_answers)
            ]

            def usage(tokens: Sequence[int]) -> dict[str, int]:
                prompt = sum(map(len, encoded))
                return {
                    "prompt_tokens": prompt,
                    "completion_tokens": sum(tokens),
                    "total_tokens": prompt + sum(tokens),
                }

            prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
            head = {
                "id": f"{prefix}-{request.state.request_id}",
                "object": kind,
                "created": int(time.time()),
                "model": self.engine.name,
            }
            pieces = write(self.engine, jobs, self.metrics)
            if not body.stream:
                collected = collect(pieces, len(jobs))
                texts, tokens, reasons = await unless_gone(request, collected, deadline - time.monotonic())
                choices = [whole(index, *answer) for index, answer in enumerate(zip(texts, reasons, strict=True))]
                who = answered_for(jobs)
                content = {**head, "choices": choices, "usage": usage(tokens), "answered_for": who}
                return JSONResponse(content, headers={ANSWERED_FOR: who})
            # the first piece tells whether there is an answer at all: until then, errors have a status
            stack.push_async_callback(pieces.aclose)
            first = await unless_gone(request, anext(pieces), deadline - time.monotonic())
            who = answered_for([jobs[first.number]])
            if kind.startswith("chat"):
                head["object"] = f"{kind}.chunk"
            events = as_events(
                first,
                pieces,
                choice,
                {**head, "answered_for": who},
                usage if body.stream_options is not None and body.stream_options.include_usage else None,
                len(jobs),
                deadline - time.monotonic(),
            )
            headers = {ANSWERED_FOR: who, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(
                _closing(stack.pop_all(), events), media_type="text/event-stream", headers=headers
            )

    def _check(self, body: AnswerRequest, key: Key) -> None:
        if body.model is not None and body.model != self.engine.name:
            raise ApiError(404, f"There is one model here, {self.engine.name!r}.", "model_not_found", "model")
        named = list(body.users) if body.users else [body.user] if body.user is not None else []
        if not all(key.may_speak_for(user) for user in named):
            raise ApiError(403, "The key may not speak for this user.", "user_not_allowed", "user")
        if body.user_profile is not None and not self.engine.has_profiles:
            raise ApiError(400, "The model was trained without profiles. Leave it out.", param="user_profile")

    async def _encode(self, prompt: str | list[int] | Messages, profile: str | None) -> list[int]:
        """
        The token ids of a prompt.

        Raises:
            [`ApiError`], [`RequestError`]: if there are none, too many, or ids that the model does not have.
        """
        ids: Any = prompt
        if isinstance(prompt, str) or isinstance(prompt[0], dict):
            ids = await asyncio.to_thread(self.engine.encode, prompt, profile)
        elif profile is not None:
            raise ApiError(400, "A profile goes into text, and the prompt is token ids.", param="user_profile")
        most = self.limits.max_prompt_tokens
        if self.engine.max_tokens is not None:
            most = min(most, self.engine.max_tokens - 1)
        if not ids:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        if len(ids) > most:
            message = f"The prompt has {len(ids)} tokens; this server takes {most}."
            raise ApiError(400, message, "context_length_exceeded")
        if max(ids) >= self.engine.vocab_size:
            raise ApiError(400, f"Token ids are 0 to {self.engine.vocab_size - 1}.", param="prompt")
        return ids

    def _sampling(self, body: AnswerRequest, prompt_ids: list[int], number: int) -> Sampling:
        left = self.limits.max_tokens
        if self.engine.max_tokens is not None:
            left = min(left, self.engine.max_tokens - len(prompt_ids))
        wanted = min(self.limits.default_tokens, left) if body.wanted_tokens is None else body.wanted_tokens
        if wanted > left:
            message = f"An answer to this prompt may have {left} tokens here; `max_tokens` is larger."
            raise ApiError(400, message, "context_length_exceeded", "max_tokens")
        seed = None if body.seed is None else body.seed + number
        return Sampling(wanted, body.heat, 1.0 if body.top_p is None else body.top_p, seed, body.stops)

    async def change(self, change: Callable[[UserAdmin], Any]) -> Any:
        """
        What a change of users returns. One is made at a time, in a thread, and to its end, whether the client waits or not.

        Raises:
            [`ApiError`]: 501 if the engine cannot change users; [`RequestError`].
        """
        admin = self.engine.admin
        if admin is None:
            raise ApiError(
                501, "This engine cannot change users. Change them in the folder, and start the server again."
            )

        async def one_at_a_time() -> Any:
            async with self.changing:
                return await asyncio.to_thread(change, admin)

        return await asyncio.shield(asyncio.ensure_future(one_at_a_time()))


async def _closing(stack: AsyncExitStack, events: AsyncIterator[str]) -> AsyncIterator[str]:
    async with stack:
        async for event in events:
            yield event
