"""What the training benchmarks share: sample lengths, random models and rows, the machine's matrix product rate."""

import argparse
import json
import platform
import random
import time
import types
from datetime import date
from pathlib import Path

SHARED_LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "adgen" / "lengths.json"
MAX_SOURCE, MAX_TARGET = 64, 128
TINY = Path(__file__).resolve().parents[1] / "models" / "chatglm2-tiny"
SIX_B = {"layers": 28, "hidden": 4096, "heads": 32, "groups": 2, "ffn": 13696, "vocab": 65024}
TINY_SHAPE = {"layers": 2, "hidden": 256, "heads": 4, "groups": 2, "ffn": 512, "vocab": 2048}

# Options of a run on random rows, which are in no file.
RANDOM_ROWS = {
    "train_file": "-",
    "prompt_column": "-",
    "response_column": "-",
    "max_source_length": MAX_SOURCE,
    "max_target_length": MAX_TARGET,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Template:
    """All that a trainer asks of one when nothing is saved."""

    pad_id = 0
    tokenizer = types.SimpleNamespace(pad_token_id=0, model_input_names=("input_ids",))


def stamp(benchmark: str) -> dict[str, str]:
    """What a summary begins with."""
    machine = platform.processor() or platform.machine()
    return {"benchmark": benchmark, "date": date.today().isoformat(), "machine": machine}


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


def write_base(folder: Path, shape: dict[str, int], bits: int | None = None) -> None:
    """A base of random numbers in the official format, fp16 or quantised; one tensor in memory at a time."""
    import torch

    from ptuning.checkpoint.model_folder import file_layout, write_rest
    from ptuning.checkpoint.shards import ShardWriter
    from ptuning.families.chatglm2.model import ChatGLMForConditionalGeneration
    from ptuning.quantization import SCALE, QuantizationConfig, precision_of, quantize_linears

    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(model_config(argparse.Namespace(**shape)))
        if bits is not None:
            quantize_linears(model, precision_of(bits))
            model.config.quantization_config = QuantizationConfig(bits)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters()}
    layout = {
        name: (size, dtype if dtype == torch.int8 else torch.float16)
        for name, (size, dtype) in file_layout(shapes, model.config).items()
    }
    writer = ShardWriter(folder, layout, 500_000_000)
    for name, (size, dtype) in layout.items():
        if dtype == torch.int8:
            tensor = torch.randint(-127, 128, size, dtype=dtype)
        elif name.endswith(SCALE):
            tensor = torch.full(size, 0.02 / precision_of(bits or 0).top, dtype=dtype)
        else:
            tensor = torch.ones(size, dtype=dtype) if len(size) == 1 else torch.randn(size).mul_(0.02).to(dtype)
        writer.write(name, tensor)
    writer.finish()
    write_rest(TINY, folder, model.config, torch.float16)


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


def matmul_rates(device: str, dtype) -> dict[str, float]:
    """FLOP/s of a large square product in this dtype: what the machine can do at all, by each library that torch has there."""
    import torch

    from ptuning.kernels import ONEDNN, TORCH, products

    n = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways = {TORCH: lambda: a @ b}
    if device == "cpu" and ONEDNN in products():
        ways[ONEDNN] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    best = dict.fromkeys(ways, 0.0)
    for _ in range(8):
        for name, way in ways.items():
            wait(device)
            started = time.perf_counter()
            for _ in range(4):
                way()
            wait(device)
            best[name] = max(best[name], 4 * 2 * n**3 / (time.perf_counter() - started))
    return best


def wait(device: str) -> None:
    """Until the device has done all that was asked of it."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
