"""What the training benchmarks share: sample lengths, random models and rows, the machine's matrix product rate."""

import argparse
import json
import random
import time
import types
from pathlib import Path

SHARED_LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "adgen" / "lengths.json"
MAX_SOURCE, MAX_TARGET = 64, 128


class Template:
    """All that a trainer asks of one when nothing is saved."""

    pad_id = 0
    tokenizer = types.SimpleNamespace(pad_token_id=0, model_input_names=("input_ids",))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's widths, the lengths and the device."""
    parser.add_argument("--lengths", type=Path, default=SHARED_LENGTHS, help="JSON list of [prompt, answer] tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")


def model_config(args: argparse.Namespace):
    """A ChatGLMConfig with the widths given."""
    from ptuning.families.chatglm2.config import ChatGLMConfig

    return ChatGLMConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        multi_query_group_num=args.groups,
        kv_channels=args.hidden // args.heads,
        ffn_hidden_size=args.ffn,
        padded_vocab_size=args.vocab,
        attn_implementation="sdpa",
    )


def random_rows(lengths: list[tuple[int, int]], vocab: int) -> list:
    """Encoded rows of random tokens, with labels on the answer."""
    from ptuning.data.encode import IGNORE, EncodedRow

    draw, rows = random.Random(0), []
    for source, target in lengths:
        ids = [draw.randrange(3, vocab) for _ in range(source + target)]
        rows.append(EncodedRow(ids, [IGNORE] * source + ids[source:], ""))
    return rows


def sample_lengths(path: Path, count: int) -> list[tuple[int, int]]:
    """Token counts of prompts and answers, cut at 64 and 128; without the real ones, ones of the same mean and spread."""
    if path.exists():
        pairs = json.loads(path.read_text())
    else:
        draw = random.Random(1)
        pairs = [[max(28, int(draw.gauss(52, 16))), max(40, int(draw.gauss(76, 20)))] for _ in range(count)]
    return [(min(s, MAX_SOURCE), min(t, MAX_TARGET)) for s, t in (pairs[i % len(pairs)] for i in range(count))]


def matmul_rate(device: str, dtype) -> float:
    """FLOP/s of a large square product in this dtype: what the machine can do at all."""
    import torch

    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * n**3 / (time.perf_counter() - started))
    return best


def wait(device: str) -> None:
    """Until the device has done all that was asked of it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
