"""Train the demo's SentencePiece tokenizer on the pretraining text, with the properties of the official one.

Byte fallback (so every string, newlines too, can be encoded and decoded), a dummy prefix, spaces kept, no
normalisation; `<unk>` 0 (also the padding), `<s>` 1, `</s>` 2. Pieces are at most four characters long: a longer piece
would hold whole phrases of our templates. The five control ids ([MASK] [gMASK] [sMASK] sop eop) follow the pieces and
are not in the file.

    python models/recipe/train_tokenizer.py --corpus corpus.jsonl --out models/chatglm2-tiny
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

CONTROL_IDS = 5
PIECES = 2048 - CONTROL_IDS
ROWS = 12_000
TOKENIZER_CONFIG = """{
  "name_or_path": "THUDM/chatglm2-6b",
  "remove_space": false,
  "do_lower_case": false,
  "tokenizer_class": "ChatGLMTokenizer",
  "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", null]}
}
"""


def sentences(corpus: Path, rows: int = ROWS) -> Iterator[str]:
    """The lines of the first `rows` rows as the prompt template shows them (SentencePiece reads no newline)."""
    with corpus.open(encoding="utf-8") as lines:
        for _, line in zip(range(rows), lines, strict=False):
            one = json.loads(line)
            for i, (ask, answer) in enumerate([*one["history"], [one["prompt"], one["response"]]], start=1):
                yield f"[Round {i}]"
                yield from f"问：{ask}\n答：{answer}".split("\n")


def trained(texts: Iterator[str], pieces: int, **more: object) -> bytes:
    """A SentencePiece file over the texts, with the properties above.

    Args:
        more: further settings of the trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentencepiece_length=4,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
        **more,
    )
    return model.getvalue()


def train(corpus: Path, out: Path) -> None:
    """Write tokenizer.model and tokenizer_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(trained(sentences(corpus), PIECES))
    (out / "tokenizer_config.json").write_text(TOKENIZER_CONFIG, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train(args.corpus, args.out)


if __name__ == "__main__":
    main()
