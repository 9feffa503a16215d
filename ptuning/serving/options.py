"""The options of `ptuning serve`."""

import contextlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ptuning.checkpoint.base import read_base_config, resolve_base
from ptuning.config import GenerationArguments, ModelArguments
from ptuning.config.commands import language_option, option, parse_options, require_address, same_option
from ptuning.config.engine import VLLM_KEY, check_engine
from ptuning.errors import ConfigError, ModelError
from ptuning.families import Family, family_of
from ptuning.language import Language
from ptuning.serving.key_file import Key, read_keys

OUTPUT = "output"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")
_HOST = re.compile(r"(\*\.)?[^\s/:*?#@]+|[0-9a-fA-F:]*:[0-9a-fA-F:.]*")


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).resolve().name, text
    if not name or not folder:
        raise ConfigError(f"--prefix {text}: expected NAME=DIR or DIR")
    return name, folder


def _alias(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not name or (equals and not model):
        raise ConfigError(f"--served_model_name {text}: expected NAME, for the base, or NAME=MODEL")
    return name, model


@dataclass(frozen=True)
class ServeOptions:
    """How to serve.

    Raises:
        ConfigError: a value or combination that can't be used.
    """

    model: str = option(
        "models/chatglm2-tiny", "base or fully tuned model: folder or hub id", aliases=("--model_name_or_path",)
    )
    prefix: tuple[tuple[str, str], ...] | None = option(
        None, f"a tuned prefix, NAME=DIR or DIR, repeatable; default: all under {OUTPUT}/", parse=_named
    )
    default_model: str | None = option(
        None, "answers REST requests that name none; default: the only prefix, else the base"
    )
    served_model_name: tuple[tuple[str, str], ...] = option(
        (),
        "NAME: of the base, the first one is shown; NAME=MODEL: a further name of a prefix; repeatable",
        parse=_alias,
    )
    dtype: str = option("auto", "of the base: auto, float32, bfloat16 or float16")
    device_map: str | None = same_option(ModelArguments, "device_map")
    tensor_parallel: int | None = same_option(ModelArguments, "tensor_parallel")
    quantization_bit: int | None = same_option(ModelArguments, "quantization_bit")
    quantization: str | None = same_option(ModelArguments, "quantization")
    double_quantization: bool = same_option(ModelArguments, "double_quantization")
    cpu_kernels: Literal["exact", "fast"] | None = option(
        None,
        "answers of a quantised base on a CPU: fast (default; packed 8-bit or 4-bit kernels) or exact, as official",
    )
    kernels: Literal["fast", "plain"] | None = option(
        None, "answers of a base in float32 on a CPU: fast (default; by oneDNN where it is clearly faster) or plain"
    )
    host: str = option("127.0.0.1", "address to listen on; beyond this machine only with --api_key")
    port: int | None = option(
        None, "of the API; default: that of the model's family, 7030 for ChatGLM2 (docs/serving.md)"
    )
    web_port: int | None = option(None, "of the page; default: that of the model's family, 7020 for ChatGLM2")
    no_page: bool = option(False, "serve the API alone")
    # Keys may come from the environment, which `ps` doesn't show.
    api_key: str | None = option(None, "clients must send it as `Authorization: Bearer KEY`", env="PTUNING_API_KEY")
    api_keys: str | None = option(
        None, "file of keys with names, NAME KEY [ANSWERS] a line; ANSWERS: that may run or wait at a time"
    )
    admin_key: str | None = option(None, "allows adding and removing prefixes while serving", env="PTUNING_ADMIN_KEY")
    allow_remote: bool = option(False, "listen beyond this machine without a key")
    allowed_host: tuple[str, ...] = option(
        (), "name by which clients ask for this server beside --host and this machine's own, repeatable; *: any"
    )
    cors_origin: tuple[str, ...] = option((), "web origin whose pages may call the API, repeatable; none by default")
    engine: Literal["continuous", "sequential", "vllm"] = option(
        "continuous", "sequential: one request at a time, for comparison; vllm: vLLM computes, at --vllm_url"
    )
    vllm_url: tuple[str, ...] | None = same_option(GenerationArguments, "vllm_url", together=True)
    vllm_key: str | None = same_option(GenerationArguments, "vllm_key", env=VLLM_KEY)
    prefix_store: str | None = option(
        None, "folder that vLLM reads prefixes from, shared by all servers before it; with --engine vllm"
    )
    max_connections: int = option(1000, "open connections; of those that bring nothing the oldest make room")
    max_concurrent: int = option(32, "answers computed together; with --engine vllm, by each vLLM")
    max_queue: int = option(64, "answers that may wait; beyond that 429")
    batch_tokens: int = option(65536, "prefix, prompt and answer tokens of all running answers")
    request_timeout: float = option(300.0, "seconds a request may take, waiting included")
    step_timeout: float = option(300.0, "seconds a step of the model may take; beyond that /health says stuck")
    grace_seconds: float = option(30.0, "seconds to finish what runs when stopped")
    log_prompts: bool = option(False, "write prompts and answers into the log")
    trace_endpoint: str | None = option(
        None, "OpenTelemetry collector that gets a span a request, OTLP over HTTP: http://127.0.0.1:4318"
    )
    lang: Language | None = language_option("greeting, and of the page until another is chosen there")
    keys: tuple[Key, ...] = field(init=False, repr=False, default=())  # of --api_key and --api_keys

    def __post_init__(self):
        least_of = {
            "port": 0,
            "web_port": 1,
            "max_concurrent": 1,
            "max_queue": 0,
            "batch_tokens": 1,
            "max_connections": 8,
        }
        for name, least in least_of.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; the least is {least}")
        for name in ("port", "web_port"):
            if (value := getattr(self, name)) is not None and value > 65535:
                raise ConfigError(f"--{name} is {getattr(self, name)}; the largest is 65535")
        for name in ("request_timeout", "step_timeout", "grace_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise ConfigError(f"--{name} is {getattr(self, name)}; use seconds above 0 and up to 86400")
        if self.trace_endpoint is not None:
            require_address("trace_endpoint", self.trace_endpoint, "http://127.0.0.1:4318")
        check_engine(self.engine, (self,), needs_store=True)
        for name in ("api_key", "admin_key", "vllm_key"):
            value = getattr(self, name)
            if value is not None and (not value or not value.isascii() or value != value.strip()):
                raise ConfigError(
                    f"--{name} is empty, has spaces around it, or isn't ASCII; HTTP headers can't carry it"
                )
        for origin in self.cors_origin:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors_origin {origin}: expected scheme://name[:port] without a path, as browsers send it"
                )
        for host in self.allowed_host:
            if host != "*" and not _HOST.fullmatch(host):
                raise ConfigError(
                    f"--allowed_host {host}: expected a name without scheme, port and path, or *.name, or *"
                )
        object.__setattr__(self, "keys", self._read_keys())
        if not _is_loopback(self.host) and not self.keys and not self.allow_remote:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there is no API key: anybody could use the model. "
                "Give --api_key KEY (or PTUNING_API_KEY in the environment), or --allow_remote if something in front of it "
                "checks who asks"
            )

    def _read_keys(self) -> tuple[Key, ...]:
        keys = () if self.api_key is None else (Key("api_key", self.api_key),)
        named = () if self.api_keys is None else read_keys(self.api_keys)
        if clash := {(key.name, key.secret) for key in named if keys and keys[0].secret == key.secret}:
            raise ConfigError(f"--api_key is also that of {clash.pop()[0]!r} in {self.api_keys}; give it once")
        return keys + named

    @property
    def sequential(self) -> bool:
        """One request at a time and nothing kept between them, as the official api.py does: for comparison."""
        return self.engine == "sequential"


def parse(argv: Sequence[str]) -> ServeOptions:
    """Reads the command line; ports that are not given are the family's. Errors as `parse_options` and ServeOptions."""
    options = parse_options(ServeOptions, argv, "ptuning serve")
    port, web_port = ports_of(options)
    return replace(options, port=port, web_port=web_port)


def ports_of(options: ServeOptions) -> tuple[int, int]:
    """Of the API and of the page. Where none is given, those by which the clients of the model's family know them; the usual ones
    where the model can't be read, which the server says when it loads."""
    port, web_port = options.port, options.web_port
    if port is not None and web_port is not None:
        return port, web_port
    family: Family | type[Family] = Family
    with contextlib.suppress(ModelError):
        family = family_of(read_base_config(resolve_base(options.model)))
    return family.port if port is None else port, family.web_port if web_port is None else web_port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
