"""The options of `ptuning serve`."""

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ptuning.errors import ConfigError

MODEL = "models/chatglm2-tiny"
OUTPUT = "output"


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; `parser` describes each option.

    Raises:
        ConfigError: a value or combination that can't be used.
    """

    model: str = MODEL
    prefix: tuple[tuple[str, str], ...] | None = None  # None: whatever is under output/
    default_model: str | None = None
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 7030
    web_port: int = 7020
    no_page: bool = False
    api_key: str | None = None
    admin_key: str | None = None
    allow_remote: bool = False
    cors_origin: tuple[str, ...] = ()
    engine: str = "continuous"
    max_concurrent: int = 32
    max_queue: int = 64
    batch_tokens: int = 65536
    request_timeout: float = 300.0
    grace_seconds: float = 30.0
    log_prompts: bool = False

    def __post_init__(self):
        for name, least in (("port", 0), ("web_port", 1), ("max_concurrent", 1), ("max_queue", 0), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; the least is {least}")
        for name in ("port", "web_port"):
            if getattr(self, name) > 65535:
                raise ConfigError(f"--{name} is {getattr(self, name)}; the largest is 65535")
        for name in ("request_timeout", "grace_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise ConfigError(f"--{name} is {getattr(self, name)}; use seconds above 0 and up to 86400")
        for name in ("api_key", "admin_key"):
            value = getattr(self, name)
            if value is not None and (not value or not value.isascii() or value != value.strip()):
                raise ConfigError(
                    f"--{name} is empty, has spaces around it, or isn't ASCII; HTTP headers can't carry it"
                )
        if not _is_loopback(self.host) and self.api_key is None and not self.allow_remote:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there is no API key: anybody could use the model. "
                "Give --api_key KEY (or PTUNING_API_KEY in the environment), or --allow_remote if something in front of it "
                "checks who asks"
            )

    @property
    def sequential(self) -> bool:
        """One request at a time and nothing kept between them, as the official api.py does: for comparison."""
        return self.engine == "sequential"


def parse(argv: Sequence[str]) -> ServeOptions:
    """Reads the command line; keys may also come from PTUNING_API_KEY and PTUNING_ADMIN_KEY, which `ps` doesn't show.

    Raises:
        ConfigError: as ServeOptions.
    """
    args = vars(parser().parse_args(argv))
    args["api_key"] = args["api_key"] or os.environ.get("PTUNING_API_KEY") or None
    args["admin_key"] = args["admin_key"] or os.environ.get("PTUNING_ADMIN_KEY") or None
    if args["prefix"] is not None:
        args["prefix"] = tuple(_named(text) for text in args["prefix"])
    return ServeOptions(**args | {"cors_origin": tuple(args["cors_origin"])})


def parser() -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in fields(ServeOptions)}
    made = argparse.ArgumentParser(prog="ptuning serve", allow_abbrev=False)

    def add(name: str, text: str, *aliases: str, **kwargs) -> None:
        kwargs.setdefault("default", defaults[name])
        made.add_argument(f"--{name}", *aliases, dest=name, help=text, **kwargs)

    add("model", f"base or fully tuned model: folder or hub id; default {MODEL}", "--model_name_or_path")
    add("prefix", f"a tuned prefix, NAME=DIR or DIR, repeatable; default: all under {OUTPUT}/", action="append")
    add("default_model", "answers REST requests that name none; default: the only prefix, else the base")
    add("dtype", "of the base: auto, float32, bfloat16 or float16")
    add("host", "address to listen on; beyond this machine only with --api_key")
    add("port", "of the API; default 7030", type=int)
    add("web_port", "of the page; default 7020", type=int)
    add("no_page", "serve the API alone", action="store_true")
    add("api_key", "clients must send it as `Authorization: Bearer KEY`")
    add("admin_key", "allows adding and removing prefixes while serving")
    add("allow_remote", "listen beyond this machine without a key", action="store_true")
    add(
        "cors_origin",
        "web origin whose pages may call the API, repeatable; none by default",
        action="append",
        default=[],
    )
    add("engine", "sequential: one request at a time, for comparison", choices=["continuous", "sequential"])
    add("max_concurrent", "answers computed together; default 32", type=int)
    add("max_queue", "answers that may wait; beyond that 429; default 64", type=int)
    add("batch_tokens", "prefix, prompt and answer tokens of all running answers; default 65536", type=int)
    add("request_timeout", "seconds a request may take, waiting included; default 300", type=float)
    add("grace_seconds", "seconds to finish what runs when stopped; default 30", type=float)
    add("log_prompts", "write prompts and answers into the log", action="store_true")
    return made


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = Path(text).resolve().name, text
    if not name or not folder:
        raise ConfigError(f"--prefix {text}: expected NAME=DIR or DIR")
    return name, folder


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
