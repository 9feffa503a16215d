"""int8 × int4 and int8 × int8 by compiled code: the stated arithmetic to the last bit, by every set of instructions here."""

import re
import threading

import pytest
import torch

from ptuning.kernels import step_code
from ptuning.loading import load_base
from ptuning.quantization import choose_kernels, int_product, int_product_code, precision_of
from ptuning.quantization.int_product import CompiledInt4, CompiledInt8, runs_on
from ptuning.quantization.int_product_code import SMALLEST
from ptuning.quantization.int_tile import GROUP, SETS
from ptuning.quantization.packed import PackedInt4, PackedInt8, works
from tests.conftest import REPO

AVX512 = SETS[0]
# AVX-512 has the 256-bit instructions too, under another name.
RUN_HERE = [each for each in SETS if runs_on(each) or runs_on(AVX512)]


KINDS = [(CompiledInt4, its) for its in RUN_HERE] + [(CompiledInt8, its) for its in RUN_HERE if its.dots]
TOPS = {CompiledInt4: 7, CompiledInt8: 127}


def matrix(rows: int, columns: int, top: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(-top, top + 1, (rows, columns), generator=draw, dtype=torch.int8), torch.rand(
        rows, generator=draw
    )


def stated(x_NC: torch.Tensor, whole_RC: torch.Tensor, scale_R: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(x_NC), len(whole_RC))
    for x, whole in zip(x_NC.float().split(GROUP, 1), whole_RC.float().split(GROUP, 1), strict=True):
        largest = x.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
        factor = torch.full_like(largest, 127) / largest  # 127 / largest would be 127 · (1 / largest)
        total += ((x * factor).round() @ whole.t()) * (largest / 127)
    return total * scale_R


@pytest.mark.parametrize(("kind", "its"), KINDS, ids=[f"{kind.bits}-{its.needs[-1]}" for kind, its in KINDS])
@pytest.mark.parametrize(("rows", "columns"), [(96, 448), (50, 16), (33, 1040)])  # whole tiles and parts, of groups too
def test_the_stated_arithmetic(kind, its, rows, columns):
    whole, scale = matrix(rows, columns, TOPS[kind])
    whole[0], whole[1] = TOPS[kind], -TOPS[kind]
    draw = torch.Generator().manual_seed(1)
    bias = torch.randn(rows, generator=draw)
    product, with_bias = (kind(whole, scale, each, its) for each in (None, bias))
    for count in (0, 1, 2, 3, its.height, its.height + 1, 37):
        x = torch.randn(count, columns, generator=draw) * torch.logspace(-3, 3, columns)
        x[2:3] = 0
        for each in (x, x.bfloat16(), x.half()):
            found = product(each)
            assert torch.equal(found, stated(each, whole, scale))
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(with_bias(each, dtype), (found + bias).to(dtype))
            assert all(torch.equal(product(row[None])[0], found[n]) for n, row in enumerate(each))


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize(("processor", "its"), [("cascadelake", AVX512), ("alderlake", SETS[1]), ("haswell", SETS[2])])
def test_no_processor_needs_a_library_for_it(processor, its, bits):
    """Where an instruction is missing, LLVM calls functions that nothing here holds."""
    llvm = pytest.importorskip("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if not llvm.get_default_triple().startswith("x86_64"):
        pytest.skip("LLVM makes code for this machine's kind alone")
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor, opt=3)
    text = step_code.source(its.lanes) if bits is None else int_product_code.source(its, bits)
    code = machine.emit_assembly(llvm.parse_assembly(text))
    named = set(
        re.findall(r"\$([A-Za-z_]\w*)", code)
    )  # whose addresses are loaded: without a rounding of its own `__truncsfbf2`
    named |= set(re.findall(r"\b(?:call|jmp)\w*\s+([A-Za-z_]\w*)", code))
    assert ("work" if bits is None else "product") in named and named <= set(re.findall(r"^(\w+):", code, re.M))


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ("llvmlite", "llvmlite is not installed, pip install 'ptuning[cpu]'"),
        ("instructions", "this CPU has no {}"),
        ("OpenMP", "this torch is built without OpenMP"),
        ("right results", "its results are wrong on this machine"),
    ],
)
def test_without_it_torchs_own_stays_and_the_line_says_why(bits, lacks, why, monkeypatch):
    compiled, torchs = (CompiledInt4, PackedInt4) if bits == 4 else (CompiledInt8, PackedInt8)
    model = load_base(REPO / "models" / "chatglm2-tiny", device="cpu", precision=precision_of(bits))
    replaced = {"llvmlite": "importlib.util.find_spec", "instructions": "_best", "OpenMP": "of_openmp"}
    if lacks in replaced:
        returned = 0 if lacks == "OpenMP" else None
        monkeypatch.setattr(f"{int_product.__name__}.{replaced[lacks]}", lambda *_: returned)
    else:

        class Wrong(compiled):
            def __call__(self, x_NC, dtype=torch.float32):
                return super().__call__(x_NC) + 8 * x_NC.float().sum(1, keepdim=True)  # the correction forgotten

        monkeypatch.setattr(type(precision_of(bits)), "packed", (Wrong, torchs))
        assert not works(Wrong, precision_of(bits).top)
    said: list[str] = []
    choose_kernels(model, "fast", said.append)
    how = f"{torchs.about}, not {compiled.about}, which is faster: {why.format('AVX2' if bits == 4 else 'VNNI')}"
    assert said == [f"CPU kernels: fast, {how} (--cpu_kernels exact: the official arithmetic, slower)"]
    kinds = {type(part.packed) for part in model.modules() if type(part).__name__ == "PackedLinear"}
    assert torchs in kinds and compiled not in kinds
