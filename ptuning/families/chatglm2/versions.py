"""Which of the models a folder holds that share ChatGLM2's `model_type` and keys of config.json: ChatGLM2, ChatGLM3 or GLM-4.

They are one network with other numbers, another chat template and another meaning of `rope_ratio`; taken for each other they load
and answer nonsense. config.json alone tells them apart only where it names the model or has GLM-4's vocabulary, so the
small files of the tokenizer are looked at too. A folder's own name says nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Version = Literal["chatglm2", "chatglm3", "chatglm4"]

_TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")
_GLM4_VOCABULARY = 150_000  # GLM-4 has 151,552 tokens, ChatGLM2 and ChatGLM3 have 65,024
_GLM4_TOKENIZER = "ChatGLM4Tokenizer"  # the class that only GLM-4's files name
_ROLE_TOKENS = ("<|user|>", "<|observation|>")  # of ChatGLM3's and GLM-4's chat template; in no ChatGLM2's files
# Parts of the official names. ChatGLM2's come first: a copy may be called "chatglm2-not-chatglm3".
_NAMES: dict[str, Version] = {"chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm-4": "chatglm4", "glm4": "chatglm4"}


def version_of(values: Mapping[str, Any], folder: Path | None = None) -> Version:
    """Which model it is.

    Args:
        values: of config.json, with the official `model_type`.
        folder: with the tokenizer's files beside config.json; None, or one that isn't there: only `values` speak.
    """
    vocabulary = values.get("padded_vocab_size", 0)
    if isinstance(vocabulary, int) and vocabulary >= _GLM4_VOCABULARY:
        return "chatglm4"
    texts = {} if folder is None else {name: text for name in _TEXTS if (text := _read(folder / name)) is not None}
    if any(_GLM4_TOKENIZER in text for text in texts.values()):
        return "chatglm4"
    names = (values.get("_name_or_path"), _name_in(texts.get("tokenizer_config.json", "")))
    named = next((found for name in names if (found := _named(name)) is not None), None)
    if any(token in text for text in texts.values() for token in _ROLE_TOKENS):
        return "chatglm4" if named == "chatglm4" else "chatglm3"
    return named or "chatglm2"


def version_in(folder: Path) -> Version:
    """Which model a folder holds, by all its small files."""
    try:
        values = json.loads(_read(folder / "config.json") or "{}")
    except ValueError:
        values = {}
    return version_of(values if isinstance(values, dict) else {}, folder)


def _named(name: Any) -> Version | None:
    """Which model a name that is written in a file says; a parent folder in it says nothing."""
    last = str(name or "").rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return next((version for part, version in _NAMES.items() if part in last), None)


def _name_in(text: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError:
        return None  # the tokenizer says what is wrong with the file
    return values.get("name_or_path") if isinstance(values, dict) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
