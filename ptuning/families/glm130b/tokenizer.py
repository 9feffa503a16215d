"""GLM-130B's tokenizer, icetk's text half, on sentencepiece itself.

Ids below 20000 are image tokens. A text's ids are those of its pieces, 20000 added; behind the pieces of `ice_text.model` come
control tokens, runs of blanks and bytes. The file that icetk downloads has the pieces alone, that of ChatGLM-6B all of them;
both are read. A newline is the piece `<n>`, a tab `<|tab|>`, two to eighty blanks `<|blank_N|>`.

Source: SwissArmyTransformer 0.2.12, `tokenization/icetk_glm_130B`; icetk 0.0.7 (MIT).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import sentencepiece

from ptuning.errors import ModelError
from ptuning.families.glm130b.config import LONG_MASK, MASK, SHORT_MASK, TOKENS
from ptuning.families.glm130b.template import GLM130BTemplate
from ptuning.families.pieces import PieceTokenizer
from ptuning.families.template import Dialogue

FILE = "ice_text.model"
IMAGE_TOKENS = 20000
_CONTROL = (
    MASK,
    LONG_MASK,
    SHORT_MASK,
    "<eod>",
    "<sop>",
    "<eop>",
    "<ENC>",
    "<dBLOCK>",
)  # as they stand behind the pieces
_TAB, _NEWLINE, _BLANKS = "<|tab|>", "<n>", 80
_BLANK = re.compile(r"<\|blank_(\d+)\|>")


class IcePieces:
    """A sentencepiece processor as icetk uses one: blanks in pieces of their own, ids shifted. Has the methods that
    PieceTokenizer and PieceTemplate ask of a processor.

    Args:
        file: `ice_text.model`, whole or without what icetk adds.
        first: id of the first piece.
    """

    def __init__(self, file: str, first: int):
        self._inner, self.first = _complete(sentencepiece.SentencePieceProcessor(model_file=file)), first

    def encode(self, text: str | Sequence[str]) -> Any:
        if not isinstance(text, str):
            return [self.encode(each) for each in text]
        return [self.first + piece for piece in self._inner.encode(_with_blanks(text))]

    def decode(self, ids: Sequence[int]) -> str:
        return _without_blanks(self._inner.decode([token - self.first for token in ids]))

    def decode_pieces(self, pieces: Sequence[str]) -> str:
        return _without_blanks(self._inner.decode_pieces(list(pieces)))

    def get_piece_size(self) -> int:
        """Ids up to the last piece, image tokens included."""
        return self.first + self._inner.get_piece_size()

    def id_to_piece(self, token: int | Sequence[int]) -> Any:
        if not isinstance(token, int):
            return [self.id_to_piece(each) for each in token]
        return self._inner.id_to_piece(token - self.first) if token >= self.first else f"<image_{token}>"

    def piece_to_id(self, piece: str) -> int:
        return self.first + self._inner.piece_to_id(piece)

    def is_byte(self, token: int) -> bool:
        return token >= self.first and self._inner.is_byte(token - self.first)


class GLM130BTokenizer(PieceTokenizer):
    """Reads `ice_text.model`. Pads on the left with `<unk>`; puts nothing in front of a text.

    Args:
        vocab_file: path of `ice_text.model`.
        num_image_tokens: ids in front of the pieces.
        tokens: name → id of the control tokens, as in config.json.

    Raises:
        ModelError: pieces and control tokens overlap.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        padding_side: str = "left",
        num_image_tokens: int = IMAGE_TOKENS,
        tokens: Mapping[str, int] | None = None,
        **kwargs: Any,
    ):
        self.tokens = dict(TOKENS if tokens is None else tokens)
        pieces: Any = IcePieces(str(vocab_file), num_image_tokens)
        for name, token in self.tokens.items():
            piece = pieces.id_to_piece(token) if token < pieces.get_piece_size() else None
            if piece is not None and piece.strip("[]<>/") not in (name.strip("[]"), {"eos": "s"}.get(name)):
                raise ModelError(
                    f"{vocab_file}: id {token} is the piece {piece!r}, and config.json says that it is {name}; the two belong to "
                    f"different models, or num_image_tokens ({num_image_tokens}) in tokenizer_config.json is wrong"
                )
        self.saved_config = {  # type: ignore[misc]  # of this very tokenizer
            "tokenizer_class": type(self).__name__,
            "num_image_tokens": num_image_tokens,
            "tokens": self.tokens,
        }
        controls = {name: token for name, token in self.tokens.items() if name != "eos"}
        super().__init__(vocab_file, pieces, controls, padding_side, first_id=num_image_tokens, **kwargs)

    def template(self) -> GLM130BTemplate:
        return GLM130BTemplate(self)

    def prompt_text(self, dialogue: Dialogue) -> str:
        """The dialogue as text, [gMASK] and sop by their names."""
        return self.spelled(dialogue, {token: name for name, token in self.tokens.items()})


def _with_blanks(text: str) -> str:
    text = text.replace("\n", _NEWLINE).replace("\t", _TAB)
    for count in range(_BLANKS, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return text


def _without_blanks(text: str) -> str:
    text = text.replace(_NEWLINE, "\n").replace(_TAB, "\t")
    return _BLANK.sub(lambda found: " " * int(found[1]), text)


def _complete(processor: sentencepiece.SentencePieceProcessor) -> sentencepiece.SentencePieceProcessor:
    """The same, with what icetk puts behind the pieces where the file hasn't got it."""
    if processor.piece_to_id(_TAB) != processor.unk_id():
        return processor
    from sentencepiece import sentencepiece_model_pb2  # here, because only this file needs it

    model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]  # made at run time
        processor.serialized_model_proto()
    )
    kind = type(model.pieces[0])
    blanks = [_TAB, *(f"<|blank_{count}|>" for count in range(2, _BLANKS + 1))]
    made = [(name, kind.CONTROL) for name in _CONTROL] + [(name, kind.USER_DEFINED) for name in blanks]
    made += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    for name, type_ in made:
        model.pieces.add(piece=name, score=0.0, type=type_)
    model.trainer_spec.byte_fallback = True
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
