"""Text for LLVM, and what makes it a program of this process: llvmlite compiles it, torch's own threads run it.

In a processor's registers lie `lanes` numbers of 32 bit; 16 where a text doesn't say otherwise. LLVM divides them where the
registers are smaller.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Sequence
from functools import cache

ATTRIBUTES = 'attributes #0 = { nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512" }'
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0)
_LN2 = (0.693359375, -2.12194440e-4)  # in two parts, of which the first is exact

_ENGINES: list[object] = []  # the code lives as long as they do


def each(template: str, **over: range) -> str:
    """Lines for all combinations; the last one varies fastest."""
    names = list(over)
    return "\n".join(
        template.format(**dict(zip(names, each, strict=True))) for each in itertools.product(*over.values())
    )


def splat(name: str, value: str, kind: str, lanes: int) -> str:
    return (
        f"{name}.one = insertelement <{lanes} x {kind}> poison, {kind} {value}, i64 0\n"
        f"{name} = shufflevector <{lanes} x {kind}> {name}.one, <{lanes} x {kind}> poison, <{lanes} x i32> zeroinitializer"
    )


def number(value: float) -> str:
    """As LLVM writes an fp32 number that need not be exact in decimals."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', struct.unpack('<f', struct.pack('<f', value))[0]))[0]:016X}"


def wide(name: str, at: str, lanes: int = 16) -> str:
    """bf16 numbers from an address on, as fp32."""
    return f"""{name}.16 = load <{lanes} x i16>, ptr {at}, align 2
{name}.32 = zext <{lanes} x i16> {name}.16 to <{lanes} x i32>
{name}.bits = shl <{lanes} x i32> {name}.32, splat (i32 16)
{name} = bitcast <{lanes} x i32> {name}.bits to <{lanes} x float>"""


def narrow(name: str, value: str, lanes: int = 16) -> str:
    """fp32 numbers rounded to bf16, as 16-bit whole numbers. By whole numbers: LLVM's own rounding asks for a library where a
    processor has no instruction for it."""
    vector, floats = f"<{lanes} x i32>", f"<{lanes} x float>"
    return f"""{name}.bits = bitcast {floats} {value} to {vector}
{name}.above = lshr {vector} {name}.bits, splat (i32 16)
{name}.odd = and {vector} {name}.above, splat (i32 1)
{name}.half = add {vector} {name}.odd, splat (i32 {0x7FFF})
{name}.up = add {vector} {name}.bits, {name}.half
{name}.is.nan = fcmp uno {floats} {value}, {value}
{name}.right = select <{lanes} x i1> {name}.is.nan, {vector} splat (i32 {0x7FC00000}), {vector} {name}.up
{name}.upper = lshr {vector} {name}.right, splat (i32 16)
{name} = trunc {vector} {name}.upper to <{lanes} x i16>"""


def rounded(name: str, value: str) -> str:
    """fp32 numbers rounded to bf16, in fp32."""
    return f"""{narrow(f"{name}.n", value)}
{name}.z = zext <16 x i16> {name}.n to <16 x i32>
{name}.s = shl <16 x i32> {name}.z, splat (i32 16)
{name} = bitcast <16 x i32> {name}.s to <16 x float>"""


def exponential(name: str, value: str, lanes: int = 16) -> str:
    """e to the power of fp32 numbers, which are first brought between -87 and 88: 2^n times a polynomial (Cephes' expf)."""
    floats, vector = f"<{lanes} x float>", f"<{lanes} x i32>"

    def every(x: float) -> str:
        return f"splat (float {number(x)})"

    lines = [
        f"{name}.low = {call('maximum', lanes, value, every(-87.0))}",
        f"{name}.c = {call('minimum', lanes, f'{name}.low', every(88.0))}",
        f"{name}.t = fmul {floats} {name}.c, {every(math.log2(math.e))}",
        f"{name}.n = {call('rint', lanes, f'{name}.t')}",
        f"{name}.r0 = {call('fmuladd', lanes, f'{name}.n', every(-_LN2[0]), f'{name}.c')}",
        f"{name}.r = {call('fmuladd', lanes, f'{name}.n', every(-_LN2[1]), f'{name}.r0')}",
    ]
    before = every(_EXP[0])
    for n, factor in enumerate(_EXP[1:]):
        lines.append(f"{name}.p{n} = {call('fmuladd', lanes, before, f'{name}.r', every(factor))}")
        before = f"{name}.p{n}"
    lines.append(
        f"""{name}.whole = call {vector} @llvm.fptosi.sat.v{lanes}i32.v{lanes}f32({floats} {name}.n)
{name}.exponent = add {vector} {name}.whole, splat (i32 127)
{name}.shifted = shl {vector} {name}.exponent, splat (i32 23)
{name}.power = bitcast {vector} {name}.shifted to {floats}
{name} = fmul {floats} {before}, {name}.power"""
    )
    return "\n".join(lines)


def call(function: str, lanes: int, *of: str) -> str:
    """One of LLVM's functions of fp32 numbers."""
    vector = f"<{lanes} x float>"
    return f"call {vector} @llvm.{function}.v{lanes}f32({', '.join(f'{vector} {each}' for each in of)})"


def declare(lanes: int) -> str:
    """Those that these texts call."""
    vector = f"<{lanes} x float>"
    lines = [
        f"declare {vector} @llvm.{name}.v{lanes}f32({', '.join([vector] * count)})"
        for name, count in (("fabs", 1), ("rint", 1), ("maximum", 2), ("minimum", 2), ("fmuladd", 3))
    ]
    return "\n".join([*lines, f"declare <{lanes} x i32> @llvm.fptosi.sat.v{lanes}i32.v{lanes}f32({vector})\n"])


def loads(arguments: Sequence[str], addresses: int) -> dict[str, str]:
    """`load_NAME` of each argument, and `at_NAME`, its place; `%a` are the arguments, in 64 bits each.

    Args:
        addresses: how many of them, the first ones, are addresses.
    """
    words = {}
    for n, name in enumerate(arguments):
        words[f"at_{name}"] = f"%{name}.at = getelementptr i64, ptr %a, i64 {n}"
        words[f"load_{name}"] = (
            words[f"at_{name}"] + f"\n%{name} = load {'ptr' if n < addresses else 'i64'}, ptr %{name}.at"
        )
    return words


@cache
def compiled(source: str, *functions: str) -> dict[str, int]:
    """Addresses of functions in a module, by name."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(source)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    return {name: engine.get_function_address(name) for name in functions}


@cache
def of_openmp(name: str) -> int:
    """Address of a function of torch's OpenMP library, which is in this process already: so there is no second pool of threads
    beside torch's. 0: torch is built otherwise."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
