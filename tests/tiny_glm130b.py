"""A whole folder of the golden GLM-130B: its merged weights, and a tokenizer whose pieces end where its control tokens begin."""

import io
import json
from pathlib import Path

import sentencepiece

from ptuning.checkpoint.merge_shards import merge_shards
from ptuning.families.glm130b.tokenizer import FILE, GLM130BTokenizer

GOLDEN = Path(__file__).parent / "golden" / "glm130b"
TOKENS = json.loads((GOLDEN / "config.json").read_text())["tokens"]


def pieces(*symbols: str, size: int = 312) -> bytes:
    """A vocabulary like icetk's: a newline is <n>, bytes for all that is rare."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the capital of France is Paris", "你好 世界"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        user_defined_symbols=["<n>", *symbols],
        byte_fallback=bool(symbols),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def make_folder(folder: Path, **options) -> Path:
    """What `ptuning merge-shards` writes, with a tokenizer. Options as of `merge_shards`."""
    merge_shards(GOLDEN / "ckpt", folder, GOLDEN / "config.json", **options)
    (folder / FILE).write_bytes(pieces("<|tab|>", "<|blank_2|>", "<|blank_3|>"))
    GLM130BTokenizer(str(folder / FILE), num_image_tokens=0, tokens=TOKENS).save_pretrained(folder)
    return folder
