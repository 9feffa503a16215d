"""int8 × int4 by compiled code: the arithmetic that it states to the last bit, on every set of instructions that runs here."""

import re
import threading

import pytest
import torch

from ptuning.loading import load_base
from ptuning.quantization import choose_kernels, int4_code, int4_product, precision_of
from ptuning.quantization.int4_code import SMALLEST
from ptuning.quantization.int4_product import CompiledInt4, runs_on
from ptuning.quantization.int4_tile import GROUP, SETS
from ptuning.quantization.packed import PackedInt4, works
from tests.conftest import REPO

AVX512 = SETS[0]
# AVX-512 has the 256-bit instructions too, under another name.
RUN_HERE = [each for each in SETS if runs_on(each) or runs_on(AVX512)]


def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(-7, 8, (rows, columns), generator=draw, dtype=torch.int8), torch.rand(rows, generator=draw)


def stated(x_NC: torch.Tensor, whole_RC: torch.Tensor, scale_R: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(x_NC), len(whole_RC))
    for x, whole in zip(x_NC.float().split(GROUP, 1), whole_RC.float().split(GROUP, 1), strict=True):
        largest = x.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
        factor = torch.full_like(largest, 127) / largest  # 127 / largest would be 127 · (1 / largest)
        total += ((x * factor).round() @ whole.t()) * (largest / 127)
    return total * scale_R


@pytest.mark.parametrize("its", RUN_HERE, ids=lambda its: its.needs[-1])
@pytest.mark.parametrize(("rows", "columns"), [(96, 448), (50, 16), (33, 1040)])  # whole tiles and parts, of groups too
def test_the_stated_arithmetic(its, rows, columns):
    whole, scale = matrix(rows, columns)
    draw = torch.Generator().manual_seed(1)
    bias = torch.randn(rows, generator=draw)
    product, with_bias = (CompiledInt4(whole, scale, each, its) for each in (None, bias))
    for count in (0, 1, 2, 3, its.height, its.height + 1, 37):
        x = torch.randn(count, columns, generator=draw) * torch.logspace(-3, 3, columns)
        x[2:3] = 0
        for each in (x, x.bfloat16(), x.half()):
            found = product(each)
            assert torch.equal(found, stated(each, whole, scale))
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(with_bias(each, dtype), (found + bias).to(dtype))
            assert all(torch.equal(product(row[None])[0], found[n]) for n, row in enumerate(each))


@pytest.mark.parametrize(("processor", "its"), [("cascadelake", AVX512), ("alderlake", SETS[1]), ("haswell", SETS[2])])
def test_no_processor_needs_a_library_for_it(processor, its):
    """Where an instruction is missing, LLVM calls functions that nothing here holds."""
    llvm = pytest.importorskip("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if not llvm.get_default_triple().startswith("x86_64"):
        pytest.skip("LLVM makes code for this machine's kind alone")
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor, opt=3)
    code = machine.emit_assembly(llvm.parse_assembly(int4_code.source(its)))
    named = set(
        re.findall(r"\$([A-Za-z_]\w*)", code)
    )  # whose addresses are loaded: without a rounding of its own `__truncsfbf2`
    assert "product" in named and named <= set(re.findall(r"^(\w+):", code, re.M))


def test_rows_that_lie_otherwise():
    whole, scale = matrix(64, 256)
    product, x = CompiledInt4(whole, scale), torch.randn(9, 300)
    parts = [x[:, 20:276], x[::2, :256], torch.randn(256, 5).t(), x[:1, :256].expand(3, 256)]
    assert all(torch.equal(product(part), stated(part, whole, scale)) for part in parts)
    x[4, 30], x[5, 30] = float("inf"), float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        wrong = ~product(x[:, 20:276], dtype).isfinite().all(1)
        assert wrong.tolist() == [row in (4, 5) for row in range(9)]


def test_several_threads_at_once():
    whole, scale = matrix(640, 512)
    product, x, found = CompiledInt4(whole, scale), torch.randn(21, 512), {}

    def compute(name: int) -> None:
        found[name] = [product(x) for _ in range(20)]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=compute, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    right = stated(x, whole, scale)
    assert len(found) == 3 and all(torch.equal(each, right) for several in found.values() for each in several)


class Wrong(CompiledInt4):
    def __call__(self, x_NC):
        return super().__call__(x_NC) + 8 * x_NC.float().sum(1, keepdim=True)  # the correction forgotten


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ("llvmlite", "llvmlite is not installed, pip install 'ptuning[cpu]'"),
        ("instructions", "this CPU has no AVX2"),
        ("OpenMP", "this torch is built without OpenMP"),
        ("right results", "its results are wrong on this machine"),
    ],
)
def test_without_it_torchs_own_stays_and_the_line_says_why(lacks, why, monkeypatch):
    model = load_base(REPO / "models" / "chatglm2-tiny", device="cpu", precision=precision_of(4))
    replaced = {"llvmlite": "importlib.util.find_spec", "instructions": "_best", "OpenMP": "of_openmp"}
    if lacks in replaced:
        returned = 0 if lacks == "OpenMP" else None
        monkeypatch.setattr(f"{int4_product.__name__}.{replaced[lacks]}", lambda *_: returned)
    else:
        monkeypatch.setattr(type(precision_of(4)), "packed", (Wrong, PackedInt4))
        assert not works(Wrong, 7)
    said: list[str] = []
    choose_kernels(model, "fast", said.append)
    how = f"bf16 × int4, not int8 × int4, which is faster: {why}"
    assert said == [f"CPU kernels: fast, {how} (--cpu_kernels exact: the official arithmetic, slower)"]
    kinds = {type(part.packed) for part in model.modules() if type(part).__name__ == "PackedLinear"}
    assert PackedInt4 in kinds and CompiledInt4 not in kinds
