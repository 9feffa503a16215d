"""The inner part of the product of int8 rows and an int4 or int8 matrix, as text for LLVM: torch has no operator for a processor's
dot product of bytes.

A matrix's numbers lie in memory as w + 8 in 0 … 15, two a byte, or as w + 128, in the order in which they are read; they are
unpacked into registers and multiplied with a tile of rows there, so that memory is read once for all rows of a batch. A row of the
input has 8-bit numbers q, in groups of `GROUP` columns with a scale each. A group's sum is exact in whole numbers (it starts at
-8 Σ q or -128 Σ q); the groups' sums are added in fp32 in one order, whatever else is in the batch.

Shapes: R outputs, C inputs of the matrix; a tile is `height` rows or fewer × `width` outputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ptuning.quantization.llvm import each, narrow, splat

GROUP = 128  # columns
# Columns of `width` outputs lie together: of 4 bit the first four in the bytes' low halves, the other four in the high ones; of 8
# bit the first four of all outputs, then the others.
STEP = 8
VECTORS = 2  # of outputs in a tile
_AHEAD = 4096  # bytes of the matrix that are asked for before they are needed


@dataclass(frozen=True)
class Instructions:
    """What a processor multiplies with.

    Args:
        needs: LLVM's names of its features.
        lanes: 32-bit sums in a register.
        height: rows of a tile; its sums stay in registers.
        dots: whether it has the dot product of four bytes each (VNNI); else it is put together of two instructions, whose sums of
            two products have 16 bit: enough for a matrix of 4 bit.
    """

    needs: tuple[str, ...]
    lanes: int
    height: int
    dots: bool = True

    @property
    def width(self) -> int:
        return VECTORS * self.lanes


# The best first.
SETS = (
    Instructions(("avx512vnni", "avx512bw", "avx512vl"), lanes=16, height=12),
    Instructions(("avx2", "avxvnni"), lanes=8, height=4),
    Instructions(("avx2",), lanes=8, height=4, dots=False),
)


def dot_declaration(its: Instructions) -> str:
    lanes, bits = its.lanes, 32 * its.lanes
    if its.dots:
        vectors = ", ".join([f"<{lanes} x i32>"] * 3)
        return f"declare <{lanes} x i32> @llvm.x86.avx512.vpdpbusd.{bits}({vectors})"
    return (
        "declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)\n"
        "declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)"
    )


def _dot(its: Instructions, name: str, total: str, weights: str, inputs: str) -> str:
    """total + Σ of four u8 × s8, in each lane."""
    lanes = its.lanes
    vector = f"<{lanes} x i32>"
    if its.dots:
        of = f"{vector} {total}, {vector} {weights}, {vector} {inputs}"
        return f"{name} = call {vector} @llvm.x86.avx512.vpdpbusd.{32 * lanes}({of})"
    return f"""{name}.w = bitcast {vector} {weights} to <32 x i8>
{name}.x = bitcast {vector} {inputs} to <32 x i8>
{name}.two = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> {name}.w, <32 x i8> {name}.x)
{name}.four = call {vector} @llvm.x86.avx2.pmadd.wd(<16 x i16> {name}.two, <16 x i16> splat (i16 1))
{name} = add {vector} {total}, {name}.four"""


def tile(its: Instructions, rows: int, bits: int) -> str:
    """`tile_ROWS`: so many rows times `width` outputs, all columns. Sums of few rows are kept in two halves: each addition waits
    for the one before it, and with so few of them there is time to wait."""
    lanes, vector, floats = its.lanes, f"<{its.lanes} x i32>", f"<{its.lanes} x float>"
    i, j, halves = range(rows), range(VECTORS), range(2 if rows * VECTORS < 4 else 1)
    low = f"splat (i32 {0x0F0F0F0F})"
    lines = [
        f"""define internal void @tile_{rows}(ptr %w, ptr %q, ptr %sums, ptr %steps, i64 %end_of_all, ptr %out, i64 %row,
 ptr %scale, ptr %bias, i64 %left, i1 %narrow) #0 {{
entry:
br label %group
group:
%first = phi i64 [0, %entry], [%end, %done]
%g = phi i64 [0, %entry], [%g.next, %done]""",
        each(f"%f{{j}}.{{i}} = phi {floats} [zeroinitializer, %entry], [%f{{j}}.{{i}}.next, %done]", j=j, i=i),
        f"""%longest = add i64 %first, {GROUP // STEP}
%end = call i64 @llvm.smin.i64(i64 %longest, i64 %end_of_all)
%of_group = mul i64 %g, {rows}
%sums.g = getelementptr i32, ptr %sums, i64 %of_group
%steps.g = getelementptr float, ptr %steps, i64 %of_group""",
    ]
    for row in i:
        lines += [
            f"%sum.at{row} = getelementptr i32, ptr %sums.g, i64 {row}",
            f"%sum{row} = load i32, ptr %sum.at{row}",
        ]
        lines += [splat(f"%start{row}", f"%sum{row}", "i32", lanes)]
    lines += ["br label %step", "step:", "%k = phi i64 [%first, %group], [%k.next, %step]"]
    # A tile that is alone in its block reads it once; what is read once shall not drive everything else out of the caches.
    ahead = ""
    if rows < its.height // 2:
        ahead = (
            f"%ahead{{j}} = getelementptr i8, ptr %w.at{{j}}, i64 {_AHEAD}\n"
            "call void @llvm.prefetch.p0(ptr %ahead{j}, i32 0, i32 0, i32 1)\n"
        )
    for half in halves:
        start = "%start{i}" if half == 0 else "zeroinitializer"
        phi = f"%a{{j}}.{{i}}.{half} = phi {vector} [{start}, %group], [%a{{j}}.{{i}}.{half}.next, %step]"
        lines += [each(phi, j=j, i=i)]
    lines += [
        f"""%w.offset = mul i64 %k, {STEP * bits // 8 * its.width}
%q.offset = mul i64 %k, {STEP * rows}
%w.k = getelementptr i8, ptr %w, i64 %w.offset
%q.k = getelementptr i8, ptr %q, i64 %q.offset""",
        each(
            f"""%w.at{{j}} = getelementptr {vector}, ptr %w.k, i64 {{j}}
{ahead}%both{{j}} = load {vector}, ptr %w.at{{j}}, align {4 * lanes}""",
            j=range(VECTORS * bits // 4),
        ),
    ]
    if bits == 4:
        lines += [
            each(
                f"""%w{{j}}.0 = and {vector} %both{{j}}, {low}
%high{{j}} = lshr {vector} %both{{j}}, splat (i32 4)
%w{{j}}.1 = and {vector} %high{{j}}, {low}""",
                j=j,
            )
        ]
    for half, row in itertools.product(range(2), i):
        four = f"{half}.{row}"
        lines += [
            f"%q.at{four} = getelementptr i32, ptr %q.k, i64 {half * rows + row}",
            f"%q{four} = load i32, ptr %q.at{four}",
        ]
        lines += [splat(f"%x{four}", f"%q{four}", "i32", lanes)]
        for block in j:
            sum_of = f"%a{block}.{row}"
            if len(halves) == 2:
                before, after = f"{sum_of}.{half}", f"{sum_of}.{half}.next"
            else:
                before, after = (f"{sum_of}.0", f"{sum_of}.mid") if half == 0 else (f"{sum_of}.mid", f"{sum_of}.0.next")
            weights = f"%w{block}.{half}" if bits == 4 else f"%both{half * VECTORS + block}"
            lines += [_dot(its, after, before, weights, f"%x{four}")]
    lines += [
        "%k.next = add i64 %k, 1",
        "%more = icmp slt i64 %k.next, %end",
        "br i1 %more, label %step, label %done",
        "done:",
    ]
    for row in i:
        lines += [
            f"%t.at{row} = getelementptr float, ptr %steps.g, i64 {row}",
            f"%t{row}.1 = load float, ptr %t.at{row}",
        ]
        lines += [splat(f"%t{row}", f"%t{row}.1", "float", lanes)]
    other = "%a{j}.{i}.1.next" if len(halves) == 2 else "zeroinitializer"
    lines += [
        each(
            f"""%whole{{j}}.{{i}} = add {vector} %a{{j}}.{{i}}.0.next, {other}
%exact{{j}}.{{i}} = sitofp {vector} %whole{{j}}.{{i}} to {floats}
%part{{j}}.{{i}} = fmul {floats} %exact{{j}}.{{i}}, %t{{i}}
%f{{j}}.{{i}}.next = fadd {floats} %f{{j}}.{{i}}, %part{{j}}.{{i}}""",
            j=j,
            i=i,
        ),
        """%g.next = add i64 %g, 1
%again = icmp slt i64 %end, %end_of_all
br i1 %again, label %group, label %exit
exit:
%left.32 = trunc i64 %left to i32""",
    ]
    numbers = ", ".join(f"i32 {lane}" for lane in range(lanes))
    for block in j:
        lines += [
            f"%here{block} = sub i32 %left.32, {lanes * block}",
            splat(f"%here.all{block}", f"%here{block}", "i32", lanes),
        ]
        lines += [
            f"""%mask{block} = icmp slt {vector} <{numbers}>, %here.all{block}
%scale.at{block} = getelementptr {floats}, ptr %scale, i64 {block}
%scale{block} = load {floats}, ptr %scale.at{block}, align 4
%bias.at{block} = getelementptr {floats}, ptr %bias, i64 {block}
%bias{block} = load {floats}, ptr %bias.at{block}, align 4"""
        ]
    lines += [
        each("%row{i} = mul i64 %row, {i}\n%row.at{i} = getelementptr i8, ptr %out, i64 %row{i}", i=i),
        each(
            f"""%scaled{{j}}.{{i}} = fmul {floats} %f{{j}}.{{i}}.next, %scale{{j}}
%y{{j}}.{{i}} = fadd {floats} %scaled{{j}}.{{i}}, %bias{{j}}""",
            j=j,
            i=i,
        ),
        "br i1 %narrow, label %bf16, label %f32",
        "f32:",
        each(_store(lanes, "float", "%y{j}.{i}"), j=j, i=i),
        "ret void",
        "bf16:",
        *(narrow(f"%n{block}.{row}", f"%y{block}.{row}", lanes) for block, row in itertools.product(j, i)),
        each(_store(lanes, "i16", "%n{j}.{i}"), j=j, i=i),
        "ret void\n}",
    ]
    return "\n".join(lines)


def _store(lanes: int, kind: str, value: str) -> str:
    """Of a row's part of a tile, as far as there are outputs."""
    name = {"float": "f32", "i16": "i16"}[kind]
    vector, at = f"<{lanes} x {kind}>", f"%{kind}.at{{j}}.{{i}}"
    return (
        f"{at} = getelementptr {vector}, ptr %row.at{{i}}, i64 {{j}}\n"
        f"call void @llvm.masked.store.v{lanes}{name}.p0({vector} {value}, ptr {at}, i32 2, <{lanes} x i1> %mask{{j}})"
    )
