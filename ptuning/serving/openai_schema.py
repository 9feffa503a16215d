"""Requests in OpenAI's format. What isn't here is refused by name, except where it asks for nothing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_ANSWERS = 32

# Fields of OpenAI's that this server doesn't have, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# About the caller, not about the answer.
_ANY_VALUE = ("metadata", "prompt_cache_key", "safety_identifier", "user")
# What clients send back of an answer that they were given.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None, ""),
    "reasoning_content": (None, ""),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def _without(values: Any, neutral: dict[str, tuple[Any, ...]], any_value: tuple[str, ...] = ()) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: value
        for key, value in values.items()
        if key not in any_value and not (key in neutral and _among(value, neutral[key]))
    }


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in values)  # 1 == True, and they mean different things


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message's content. Only text: the model sees nothing else."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without(values, _NEUTRAL_IN_MESSAGE)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """`include_usage` adds a last event with the token counts."""

    include_usage: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without(values, {"include_obfuscation": (None, False)})


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=1, le=2**31)]


class _Sampled(_Strict):
    """What both kinds of request have. null is the same as leaving a field out."""

    model: str = Field(description="a prefix's name, or the base's (also: base)")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default: the model's own")
    top_p: float | None = Field(None, ge=0, le=1, description="default: the model's own")
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: Seed | None = Field(None, description="the same seed gives the same answer; answer i of n has seed + i")
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without(values, _NEUTRAL, _ANY_VALUE)

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_pairs(self):
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Sampled):
    """POST /v1/completions: text goes to the model as it is, without the dialogue template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
    max_tokens: Tokens | None = Field(None, description="default 16, as OpenAI has it")
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _refuse_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], (int, list)):
            raise ValueError("token ids aren't supported; send text")
        return value

    @property
    def texts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


class PrefixRequest(_Strict):
    """POST /v1/prefixes."""

    name: str = Field(min_length=1, max_length=64, description="letters, digits, '_', '-' and '.'")
    path: str = Field(
        min_length=1, max_length=1024, description="folder on the server: ours, the official trainer's or peft's"
    )
