"""Requests in OpenAI's format. What isn't here is refused by name, except where it asks for nothing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

MOST_ANSWERS = 32

# Fields of OpenAI's that this server doesn't have, and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "web_search_options": (None,),
}
# About the caller, the account or what a model may do; none of it changes an answer of this one. A model that calls no tools
# may be offered some: it answers in words, as OpenAI's may. Only a call that is forced is refused (tool_choice).
_ANY_VALUE = (
    "functions",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "tools",
    "user",
    "verbosity",
)


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


class _Open(_Strict):
    """Fields that it doesn't know are ignored, as OpenAI's server does: clients send back what other servers gave them."""

    model_config = ConfigDict(extra="ignore")


class TextPart(_Open):
    """A part of a message's content. Only text: the model sees nothing else."""

    type: Literal["text"]
    text: str


class Message(_Open):
    """One message; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(None, validate_default=True)
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") == "user":
            raise ValueError("a user's message needs text")
        return value

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
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
Whole = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)  # 8.0
Tokens = Annotated[int, Whole, Field(ge=1, le=2**31)]
Count = Annotated[int, Whole, Field(ge=1, le=MOST_ANSWERS)]
Choice = Annotated[str, Field(min_length=1, max_length=1024)]


class JsonSchema(_Open):
    """The schema of a response_format, in OpenAI's form."""

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Open):
    """text; json_object: any JSON object; json_schema: JSON of the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: missing")
        return self


class _Sampled(_Strict):
    """What both kinds of request have. null is the same as leaving a field out."""

    model: str = Field(description="a prefix's name, or the base's (also: base)")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default: the model's own")
    top_p: float | None = Field(None, ge=0, le=1, description="default: the model's own")
    top_k: Annotated[int, Whole, Field(ge=-1, le=2**31)] | None = Field(None, description="0 and -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    n: Count | None = None
    best_of: Count | None = Field(None, description="so many are made, and the n likeliest of them given")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: Seed | None = Field(None, description="the same seed gives the same answer; answer i of n has seed + i")
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="transformers' definition; default 1")
    response_format: ResponseFormat | None = None
    guided_choice: Annotated[list[Choice], Field(min_length=1, max_length=256)] | None = Field(
        None, description="the answer is one of these texts"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        values = _without(values, _NEUTRAL, _ANY_VALUE)
        for name in ("tool_choice", "function_call"):
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{name}: forces a call, and this model calls no tools; leave it out or send 'auto'")
        return values

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        if (self.best_of or self.count) < self.count:
            raise ValueError(f"best_of: is {self.best_of} and n is {self.count}; best_of is at least n")
        if self.stream and (self.best_of or self.count) > self.count:
            raise ValueError("best_of: only without stream, for the best is known at the end")
        if self.guided_choice and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("guided_choice: only without response_format; give one of them")
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


class TokenizeRequest(_Strict):
    """POST /tokenize, as vLLM has it: a text, or messages in the template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check_one(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        if self.messages is not None and not self.add_generation_prompt:
            raise ValueError("add_generation_prompt: the template has none to leave out; only true")
        return self


class DetokenizeRequest(_Strict):
    """POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=131_072)


class PrefixRequest(_Strict):
    """POST /v1/prefixes."""

    name: str = Field(min_length=1, max_length=64, description="letters, digits, '_', '-' and '.'")
    path: str = Field(
        min_length=1, max_length=1024, description="folder on the server: ours, the official trainer's or peft's"
    )
