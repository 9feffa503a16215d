"""The tokenizer of a GLM-4's original format, on the tokenizers library: the ids, special tokens and files of the official one.

Source: THUDM/glm-4-9b-chat `tokenization_chatglm.py`, which needs tiktoken.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from ptuning.families.chatglm4.ranks import read_ranks
from ptuning.families.roles import ROLES

# Text is divided into these before anything is merged.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
BEGIN = ("[gMASK]", "<sop>")
# Their ids follow the last rank, in this order.
CONTROL_TOKENS = (
    *(END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *(f"<|{role}|>" for role in ROLES),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
# What tokenizer_config.json says of tokens; here the file with the ranks does.
_OWN = (
    *("unk_token", "bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"),
    *("added_tokens_decoder", "clean_up_tokenization_spaces"),
)


class _Converter(TikTokenConverter):
    """transformers' own, without the tiktoken package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_ranks(tiktoken_url)


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """Reads a tiktoken `tokenizer.model`. `<|endoftext|>` ends, and pads on the left; a sequence begins with [gMASK] <sop>.

    Args:
        vocab_file: path of `tokenizer.model`.

    Raises:
        ModelError: the file isn't a tiktoken vocabulary.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, padding_side: str = "left", **kwargs: Any):
        backend = _Converter(str(vocab_file), PATTERN, extra_special_tokens=CONTROL_TOKENS).converted()
        begin = " ".join(BEGIN)
        backend.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(t, backend.token_to_id(t)) for t in BEGIN]
        )
        super().__init__(
            tokenizer_object=backend,
            vocab_file=str(vocab_file),
            padding_side=padding_side,
            eos_token=END,
            pad_token=END,
            extra_special_tokens=list(CONTROL_TOKENS[1:]),
            clean_up_tokenization_spaces=False,
            **{name: value for name, value in kwargs.items() if name not in _OWN},
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Nothing: the parent's would take the file for SentencePiece's."""
        return kwargs

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> tuple[str, ...]:
        """Writes the official folder's tokenizer.model and tokenizer_config.json, with the chat template that was read."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
            "added_tokens_decoder": {
                str(number): {
                    "content": token.content,
                    **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
                    "special": True,
                }
                for number, token in sorted(self.added_tokens_decoder.items())
            },
            "additional_special_tokens": list(CONTROL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": END,
            "pad_token": END,
            "padding_side": "left",
            "remove_space": False,
            "tokenizer_class": "ChatGLM4Tokenizer",
        }
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (str(config), *self.save_vocabulary(str(folder)))
