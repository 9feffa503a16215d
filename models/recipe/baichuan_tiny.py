"""Write `models/baichuan-tiny`: Baichuan2-13B's network and files, small, with random weights and a tokenizer of its own.

Nothing is learned but the vocabulary: the folder is there so that every command can be run on a Baichuan. Pieces 195 and 196 are
the official names of the two speakers, in front of the bytes, as in the official file; those before them fill the numbers. The
texts are the repo's own data sets.

    python models/recipe/baichuan_tiny.py [--out models/baichuan-tiny]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from train_tokenizer import trained

from ptuning.families.baichuan.config import BaichuanConfig
from ptuning.families.baichuan.model import BaichuanForCausalLM
from ptuning.families.baichuan.template import ASSISTANT, USER, BaichuanTemplate
from ptuning.families.baichuan.tokenizer import BaichuanTokenizer

ROOT = Path(__file__).resolve().parents[2]
PIECES = 1024
FIRST_RESERVED = 89  # so that <reserved_106>, the user, is piece 195
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_hidden_layers": 2}
STD = 0.15  # of the weights; at the official 0.02 so narrow a network hardly sees its past
AUTO_MAP = {
    "AutoConfig": "configuration_baichuan.BaichuanConfig",
    "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
}


def sentences() -> Iterator[str]:
    for line in (ROOT / "data" / "advertise" / "train.json").read_text(encoding="utf-8").splitlines():
        yield from json.loads(line).values()
    for line in (ROOT / "data" / "dialogue" / "train.json").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield from (row["prompt"], row["response"])


def train_tokenizer(folder: Path) -> None:
    unused = [f"<unused_{i}>" for i in range(FIRST_RESERVED - 3)]
    names = [*unused, *(f"<reserved_{i}>" for i in range(108))]
    (folder / "tokenizer.model").write_bytes(trained(sentences(), PIECES, user_defined_symbols=names))
    BaichuanTokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = BaichuanConfig(vocab_size=PIECES, model_max_length=1024, norm_head=True, initializer_range=STD, **SHAPE)
    model = BaichuanForCausalLM(config)
    model.half().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write(folder / "config.json", values | {"auto_map": AUTO_MAP, "tokenizer_class": "BaichuanTokenizer"})
    ids = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "user_token_id": USER,
        "assistant_token_id": ASSISTANT,
    }
    write(
        folder / "generation_config.json", ids | {"do_sample": True, "max_new_tokens": 256} | BaichuanTemplate.sampling
    )
    (folder / "model.safetensors").chmod(0o644)


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "baichuan-tiny")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(folder)
    make_model(folder)


if __name__ == "__main__":
    main()
