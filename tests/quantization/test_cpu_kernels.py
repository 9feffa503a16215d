"""`--cpu_kernels fast`: packed products near the exact ones, each row by itself, and what can't have them."""

import json
import math

import pytest
import torch

from ptuning.cli import main
from ptuning.config import parse
from ptuning.config.options import ModelArguments
from ptuning.errors import ConfigError
from ptuning.generation import Engine, GenerationRequest, Prefix
from ptuning.loading import load_base, load_model
from ptuning.main import build_model
from ptuning.methods import LoraMethod, detach, method_of
from ptuning.methods.prefix.encoder import PrefixEncoder, PrefixShape
from ptuning.quantization import choose_kernels, packed, precision_of, precisions
from ptuning.quantization.cpu_kernels import PackedLinear
from ptuning.quantization.packed import works
from ptuning.serving.models import LoadedModel
from tests.conftest import REPO
from tests.generation.conftest import answers
from tests.methods.test_lora import randomise

BASE = REPO / "models" / "chatglm2-tiny"
BITS = [precision.bits for precision in precisions()]
PRODUCTS = [(precision.bits, kind) for precision in precisions() for kind in precision.packed]


def is_packed(model) -> bool:
    return any(isinstance(part, PackedLinear) for part in model.modules())


@pytest.fixture(scope="module", params=BITS)
def fast(request):
    """A base with fast kernels. Nothing stays attached to it."""
    model = load_base(BASE, device="cpu", precision=precision_of(request.param))
    choose_kernels(model, "fast", str)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "kind"), PRODUCTS)
def test_the_product(bits, kind, dtype):
    precision, draw = precision_of(bits), torch.Generator().manual_seed(1)
    weight = torch.randn(96, 448, generator=draw)
    weight[3] = 0
    stored, scale = precision.quantize(weight)
    x = torch.randn(37, 448, generator=draw)
    x[5], x[6], x[7] = 0, x[6] * 1e4, x[7] * 1e-4  # a row's size is its own
    x = x.to(dtype)
    product = kind(precision.unpack(stored), scale)
    found, exact = product(x), x.float() @ precision.dequantize(stored, scale, torch.float32).t()
    some = [row for row in range(37) if row != 5]
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1))[some].max() < 0.015
    assert not found[5].any() and not found[:, 3].any()
    assert all(torch.equal(found[row], product(x[row : row + 1])[0]) for row in range(37))
    x[9, 0] = math.nan
    assert product(x)[9].isnan().all() and torch.equal(product(x)[10], found[10])


def test_logits_are_near_and_every_layer_is_packed(fast):
    exact = load_base(BASE, device="cpu", precision=precision_of(fast.config.quantization_config.bits))
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        near, true = fast(input_ids=ids).logits, exact(input_ids=ids).logits
    assert 0 < (near - true).norm() / true.norm() < 0.05
    linears = [part for part in fast.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linears) == 4 * 6 + 1 and all(isinstance(part, PackedLinear) for part in linears)
    assert not any(
        parameter.dtype == torch.int8 and parameter.numel() for parameter in fast.parameters()
    )  # the originals are gone


def test_a_mixture_of_base_prefix_and_lora_equals_one_by_one(fast):
    torch.manual_seed(3)
    encoder = PrefixEncoder(PrefixShape.of(fast.config), 8)
    with torch.no_grad():
        encoder.embedding.weight.mul_(4)
    method_of(ModelArguments(str(BASE), method="lora"), trains=True).start(fast)
    randomise(fast, seed=1)
    lora = LoraMethod.served(fast.eval(), "lora")
    detach(fast)
    companions = [None, Prefix.of("prefix", encoder, fast.dtype), lora]
    requests = [GenerationRequest(n, list(range(5 + n, 15 + 3 * n)), 10, prefix=companions[n % 3]) for n in range(7)]
    with Engine(fast, []) as engine:
        together = answers(engine, requests)
        alone = {request.id: answers(engine, [request])[request.id] for request in requests}
        of_first = {
            name: tuple(answers(engine, [GenerationRequest(0, requests[0].ids, 10, prefix=each)])[0])
            for name, each in enumerate(companions)
        }
    assert together == alone
    assert len(set(of_first.values())) == 3


def test_no_gradients_and_no_training(fast):
    layer = next(part for part in fast.modules() if isinstance(part, PackedLinear))
    with pytest.raises(ConfigError, match="--cpu_kernels fast has no gradients: use --cpu_kernels exact"):
        layer(torch.zeros(1, layer.in_features, requires_grad=True))
    options = ["--do_train", "--model_name_or_path", "m", "--train_file", "t.json", "--prompt_column", "q"]
    options += ["--response_column", "a", "--output_dir", "out", "--quantization_bit", "8", "--cpu_kernels", "fast"]
    with pytest.raises(ConfigError, match="--cpu_kernels fast only answers: it has no gradients; leave it out"):
        parse(options)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_that_a_kernel_does_not_take_stay_exact(golden_dir, bits, monkeypatch):
    monkeypatch.setattr(precision_of(bits).packed[0], "takes", staticmethod(lambda rows, columns: columns != 96))
    model = load_base(golden_dir / f"chatglm2-tiny-int{bits}", device="cpu")
    choose_kernels(model, "fast", str)
    kept = {name.rpartition(".")[2] for name, part in model.named_modules() if type(part).__name__ == "QuantizedLinear"}
    assert kept == {"down_proj"} and is_packed(model)


# --- which kernels, and what is said ------------------------------------------------------------------------------------


def test_the_probe_notices_sums_that_saturate(monkeypatch):
    assert all(works(kind, precision_of(bits).top) for bits, kind in PRODUCTS)

    class Saturating(packed.PackedInt8):
        def __call__(self, x_NC):
            return super().__call__(x_NC).clamp_(-100 * 127.0, 100 * 127.0)

    class Spanning(packed.PackedInt8):
        def __call__(self, x_NC):
            whole = x_NC.reshape(1, -1)  # one scale for all rows
            largest = whole.abs().amax()
            return super().__call__((x_NC / largest * 127).round() / 127 * largest)

    class Missing(packed.PackedInt8):
        def __call__(self, x_NC):
            return torch.ops.quantized.there_is_no_such_operation(x_NC)

    assert not any(works(kind, 127) for kind in (Saturating, Spanning, Missing))


def test_without_the_kernels_the_base_stays_exact(monkeypatch):
    monkeypatch.setattr("ptuning.quantization.cpu_kernels.works", lambda kind, top: False)
    said: list[str] = []
    model = load_base(BASE, device="cpu", precision=precision_of(8))
    choose_kernels(model, None, said.append)
    assert said == ["CPU kernels: exact instead of fast: torch's packed products are missing or wrong on this machine"]
    assert not is_packed(model)


@pytest.mark.parametrize(
    ("bits", "asked", "said"),
    [
        (8, None, ["CPU kernels: fast, int8 × int8 (--cpu_kernels exact: the official arithmetic, slower)"]),
        (4, "fast", ["CPU kernels: fast, int8 × int4 (--cpu_kernels exact: the official arithmetic, slower)"]),
        (8, "exact", ["CPU kernels: exact"]),
        (None, None, []),
        (None, "exact", []),
        (
            None,
            "fast",
            ["CPU kernels: exact instead of fast: the base isn't in whole numbers (--quantization_bit 8 or 4)"],
        ),
    ],
)
def test_chat_and_serve_say_which(bits, asked, said):
    lines: list[str] = []
    loaded = LoadedModel.load(BASE, "auto", bits, cpu_kernels=asked, say=lines.append)
    assert lines == said and is_packed(loaded.model) == ("fast," in "".join(said))


def test_nothing_is_changed_on_an_accelerator():
    said: list[str] = []
    model = load_base(BASE, device="cpu", precision=precision_of(8)).to("meta")
    choose_kernels(model, None, said.append)
    choose_kernels(model, "fast", said.append)
    assert said == ["CPU kernels: exact instead of fast: the base isn't on a CPU"] and not is_packed(model)


def test_predict_is_exact_unless_asked(tmp_path, capsys):
    file, found = tmp_path / "questions.jsonl", {}
    file.write_text("".join(json.dumps({"question": f"类型#上衣*颜色#{color}"}) + "\n" for color in "红黄蓝白黑"))
    options = [
        "--file",
        str(file),
        "--model_name_or_path",
        str(BASE),
        "--quantization_bit",
        "8",
        "--max_new_tokens",
        "16",
    ]
    for kernels in ([], ["--cpu_kernels", "exact"], ["--cpu_kernels", "fast"]):
        output = tmp_path / f"answers-{len(found)}.jsonl"
        assert main(["predict", *options, "--output", str(output), *kernels]) == 0
        found[tuple(kernels)] = output.read_text()
        assert ("CPU kernels: fast, int8" in capsys.readouterr().out) == ("fast" in kernels)
    first, second, fast = found.values()
    assert first == second and len(fast.splitlines()) == 5


@pytest.mark.parametrize("asked", [None, "fast"])
def test_evaluate_is_exact_unless_asked(asked, tmp_path):
    options = [
        "--do_predict",
        "--model_name_or_path",
        str(BASE),
        "--test_file",
        "t.json",
        "--output_dir",
        str(tmp_path),
    ]
    options += ["--prompt_column", "q", "--response_column", "a", "--quantization_bit", "8", "--dtype", "float16"]
    config, _ = parse(options + ([] if asked is None else ["--cpu_kernels", asked]))
    said: list[str] = []
    model = build_model(config, None, said.append)
    assert is_packed(model) == (asked == "fast")
    assert model.dtype == torch.bfloat16 and said[0].startswith("note: float16 is many times slower on a CPU")
    assert said[1].startswith("CPU kernels: fast" if asked else "CPU kernels: exact")


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_float16_on_a_cpu_is_bfloat16_and_says_so(dtype):
    said: list[str] = []
    model, _ = load_model(BASE, dtype=dtype, device="cpu", say=said.append)
    assert model.dtype == torch.bfloat16
    assert said == ["note: float16 is many times slower on a CPU; the base is in bfloat16 instead"]
