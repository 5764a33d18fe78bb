"""What clients send: OpenAI's fields, and ours beside them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


LOWEST, HIGHEST = -1.0, 2.0  # of a strength, and of a weight in a blend
MOST_CHOICES, MOST_BLENDED, MOST_STOPS, MOST_PROMPTS = 16, 16, 16, 64
LARGEST_SEED = 2**62
GREEDY_BELOW = 1e-4  # a temperature below it would divide logits beyond float32

UserName = Annotated[str, Field(min_length=1, max_length=512)]
Strength = Annotated[float, Field(ge=LOWEST, le=HIGHEST, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Strict(BaseModel):
    """No field that we do not know, and nothing taken for another type: what is ignored would be answered wrongly."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = Field(False, description="Whether a last event has the numbers of tokens.")
    include_obfuscation: Literal[False] | None = None


class AnswerRequest(Strict):
    """What both routes have in common."""

    model: str | None = Field(None, max_length=512, description="The name in `/v1/models`, or nothing.")
    user: UserName | None = Field(
        None, description="The user to answer. Without one, and for an unknown one, the generic user is answered."
    )
    users: dict[UserName, Strength] | None = Field(
        None, min_length=1, max_length=MOST_BLENDED, description="In place of `user`: weights of several, a blend."
    )
    user_strength: Strength = Field(1.0, description="From the generic user (0) to the user (1).")
    user_profile: str | None = Field(
        None, max_length=20_000, description="Text about the user, for a model that was trained with profiles."
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="The most tokens of an answer.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="How many answers to a prompt.")
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # fields of OpenAI's that clients send as they are by default, and that mean something else with any other value
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "AnswerRequest":
        if self.user is not None and self.users is not None:
            raise ValueError("`user` names one user and `users` several: give one of them.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` need `stream`.")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens of an answer; `None` if the request does not say."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def heat(self) -> float:
        """The temperature, 0 where sampling would be greedy anyway."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return 0.0 if temperature < GREEDY_BELOW else temperature


class TextPart(Strict):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=512)

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(AnswerRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Another name of `max_tokens`.")
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=0)] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens of an answer; `None` if the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(AnswerRequest):
    """The body of `/v1/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one after the other."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class Pair(BaseModel):
    """A preference of a user, as in training. Columns that the training had besides may be there too."""

    model_config = ConfigDict(extra="allow", strict=True)

    user_id: UserName
    prompt: str | list[Message] | None = None
    chosen: str | list[Message]
    rejected: str | list[Message]

    def row(self) -> dict[str, Any]:
        """As a row of a dataset."""
        return self.model_dump(exclude_none=True)


class JoinRequest(Strict):
    """The body of `/v1/users/join`."""

    pairs: list[Pair] = Field(default=[], max_length=100_000)
    user_ids: list[UserName] = Field(default=[], max_length=100_000, description="Users who join without pairs.")

    @model_validator(mode="after")
    def _check(self) -> "JoinRequest":
        if not self.pairs and not self.user_ids:
            raise ValueError("there is nobody to join: give `pairs` or `user_ids`.")
        return self


class UpdateRequest(Strict):
    """The body of `/v1/users/update`."""

    pairs: list[Pair] = Field(min_length=1, max_length=100_000)


class UsersRequest(Strict):
    """The body of `/v1/users/remove` and `/v1/users/export`."""

    user_ids: list[UserName] = Field(min_length=1, max_length=100_000)


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or above."""

    error: ErrorDetail
