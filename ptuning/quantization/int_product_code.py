"""A program for LLVM around the tiles of `int_tile.py`: rows are rounded to 8 bit, then threads take blocks of outputs in turn.

Each row is rounded by itself, in groups of `GROUP` columns: scale = largest / 127, q = round(x · 127 / largest), ties to even. NaN
is kept in the scale. N rows are divided into tiles of equal height, give or take one; a tile's q lie as [C / 4][rows][4].
"""

from __future__ import annotations

from string import Template

from ptuning.quantization.int_tile import GROUP, STEP, Instructions, dot_declaration, tile
from ptuning.quantization.llvm import ATTRIBUTES, declare, each, loads, number, splat, wide

MULTIPLE = 16  # of columns: so many are rounded at a time
SMALLEST = 2.0**-100  # taken for a group's largest number where that is smaller

# What `run` is told, each in 64 bits: addresses (of x, w, …), numbers; `rows` and `blocks` are counters and begin at 0.
ARGUMENTS = (
    "x",
    "w",
    "scale",
    "out",
    "q",
    "sums",
    "steps",
    "bias",
    "parallel",
    "distance",
    "N",
    "C",
    "R",
    "threads",
    "is_bf16",
    "to_bf16",
    "rows",
    "blocks",
)
_ADDRESSES = 9  # the first ones


def source(instructions: Instructions, bits: int) -> str:
    """A module with `run(arguments)`, which computes on as many threads as it is told, by OpenMP's `GOMP_parallel`. A
    thread takes half of its share of the blocks that are left at a time, neighbours: long stretches of memory are read fastest.

    x (N, C) fp32 or bf16, `distance` numbers from row to row; w as `Compiled` packs it; scale and bias (R,) fp32, padded to
    whole tiles; out (N, R) fp32 or bf16; q (N, C) int8 and sums, steps (N, groups) 32 bit are room to work in.
    """
    tiles = [tile(instructions, rows, bits) for rows in range(1, instructions.height + 1)]
    words = loads(ARGUMENTS, _ADDRESSES) | {
        "height": instructions.height,
        "less": instructions.height - 1,
        "group": GROUP,
        "step": STEP,
    }
    words |= {
        "width": instructions.width,
        "column": instructions.width * bits // 8,
        "last": GROUP - 1,
        "last_of_block": instructions.width - 1,
    }
    words["cases"] = each("i64 {m}, label %of{m}", m=range(1, instructions.height + 1))
    words["calls"] = each(
        "of{m}:\ncall void @tile_{m}(ptr %w.b, ptr %q.t, ptr %sums.t, ptr %steps.t, i64 %all, ptr %out.t, i64 %row, ptr %scale.b, "
        "ptr %bias.b, i64 %left, i1 %narrow)\nbr label %tiled",
        m=range(1, instructions.height + 1),
    )
    words["tiles"] = Template(_TILES).substitute(words)
    parts = [
        dot_declaration(instructions),
        declare(16),
        ATTRIBUTES,
        _DECLARATIONS.replace("LANES", str(instructions.lanes)),
        *tiles,
    ]
    return "\n".join(
        [*parts, *(_row(kind, bits) for kind in _LOADS), Template(_QUANTISE + _PRODUCT + _RUN).substitute(words)]
    )


def _row(kind: str, bits: int) -> str:
    words = {"zero": 1 << (bits - 1), "kind": kind, "group": GROUP, "smallest": number(SMALLEST)}
    words |= {"load_v": _load(kind, "v", "%k"), "load_y": _load(kind, "y", "%j")}
    words["factors"] = splat("%factors", "%factor", "float", 16)
    store = "%four{e} = extractelement <4 x i32> %fours, i64 {e}\n%to{e} = getelementptr i32, ptr %q.k, i64 %m{e}\n"
    words["stores"] = each(store + "store i32 %four{e}, ptr %to{e}", e=range(4))
    return Template(_ROW).substitute(words)


def _load(kind: str, name: str, column: str) -> str:
    """16 numbers of the input's row, from a column on."""
    size = {"f32": 4, "bf16": 2}[kind]
    at = f"%{name}.offset = mul i64 {column}, {size}\n%{name}.at = getelementptr i8, ptr %x, i64 %{name}.offset\n"
    return at + _LOADS[kind].replace("NAME", name)


_DECLARATIONS = """
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare float @llvm.maximum.f32(float, float)
declare void @llvm.masked.store.vLANESf32.p0(<LANES x float>, ptr, i32, <LANES x i1>)
declare void @llvm.masked.store.vLANESi16.p0(<LANES x i16>, ptr, i32, <LANES x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare float @llvm.vector.reduce.fmaximum.v16f32(<16 x float>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""

_LOADS = {
    "f32": "%NAME = load <16 x float>, ptr %NAME.at, align 4",
    "bf16": wide("%NAME", "%NAME.at"),
}

# One row of a tile of m. q, sums and steps point at its own first one.
_ROW = """
define internal void @row_$kind(ptr %x, i64 %C, ptr %q, ptr %sums, ptr %steps, i64 %m) #0 {
entry:
%m0 = mul i64 %m, 0
%m1 = mul i64 %m, 1
%m2 = mul i64 %m, 2
%m3 = mul i64 %m, 3
br label %group
group:
%first = phi i64 [0, %entry], [%end, %done]
%g = phi i64 [0, %entry], [%g.next, %done]
%longest = add i64 %first, $group
%end = call i64 @llvm.smin.i64(i64 %longest, i64 %C)
br label %look
look:
%k = phi i64 [%first, %group], [%k.next, %look]
%large = phi <16 x float> [zeroinitializer, %group], [%large.next, %look]
$load_v
%v.abs = call <16 x float> @llvm.fabs.v16f32(<16 x float> %v)
%large.next = call <16 x float> @llvm.maximum.v16f32(<16 x float> %large, <16 x float> %v.abs)
%k.next = add i64 %k, 16
%more = icmp slt i64 %k.next, %end
br i1 %more, label %look, label %looked
looked:
%largest.found = call float @llvm.vector.reduce.fmaximum.v16f32(<16 x float> %large.next)
%largest = call float @llvm.maximum.f32(float %largest.found, float $smallest)
%scale = fdiv float %largest, 127.0
%factor = fdiv float 127.0, %largest
$factors
br label %write
write:
%j = phi i64 [%first, %looked], [%j.next, %write]
%sum = phi <16 x i32> [zeroinitializer, %looked], [%sum.next, %write]
$load_y
%scaled = fmul <16 x float> %y, %factors
%rounded = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled)
%whole = call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float> %rounded)
%sum.next = add <16 x i32> %sum, %whole
%bytes = trunc <16 x i32> %whole to <16 x i8>
%fours = bitcast <16 x i8> %bytes to <4 x i32>
%q.offset = mul i64 %j, %m
%q.k = getelementptr i8, ptr %q, i64 %q.offset
$stores
%j.next = add i64 %j, 16
%more.j = icmp slt i64 %j.next, %end
br i1 %more.j, label %write, label %done
done:
%total = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %sum.next)
%start = mul i32 %total, -$zero
%of.group = mul i64 %g, %m
%sums.at = getelementptr i32, ptr %sums, i64 %of.group
store i32 %start, ptr %sums.at
%steps.at = getelementptr float, ptr %steps, i64 %of.group
store float %scale, ptr %steps.at
%g.next = add i64 %g, 1
%again = icmp slt i64 %end, %C
br i1 %again, label %group, label %exit
exit:
ret void
}
"""

_TILES = """%N.up = add i64 %N, $less
%tiles = udiv i64 %N.up, $height
%C.up = add i64 %C, $last
%groups = udiv i64 %C.up, $group"""

_QUANTISE = """
define void @quantise(ptr %a) #0 {
entry:
$load_x
$load_distance
$load_is_bf16
$load_N
$load_C
$load_q
$load_sums
$load_steps
$at_rows
$tiles
%wide = icmp eq i64 %is_bf16, 0
%size = select i1 %wide, i64 4, i64 2
%bytes = mul i64 %size, %distance
br label %next
next:
%n = atomicrmw add ptr %rows.at, i64 1 monotonic
%over = icmp sge i64 %n, %N
br i1 %over, label %exit, label %one
one:
%n.next = add i64 %n, 1
%up.to = mul i64 %n.next, %tiles
%before = sub i64 %up.to, 1
%t = udiv i64 %before, %N
%t.N = mul i64 %t, %N
%first = udiv i64 %t.N, %tiles
%t.next = add i64 %t, 1
%t.next.N = mul i64 %t.next, %N
%end = udiv i64 %t.next.N, %tiles
%m = sub i64 %end, %first
%i = sub i64 %n, %first
%x.offset = mul i64 %n, %bytes
%x.n = getelementptr i8, ptr %x, i64 %x.offset
%q.offset = mul i64 %first, %C
%q.t = getelementptr i8, ptr %q, i64 %q.offset
%q.n = getelementptr i32, ptr %q.t, i64 %i
%of.tile = mul i64 %first, %groups
%of.row = add i64 %of.tile, %i
%sums.n = getelementptr i32, ptr %sums, i64 %of.row
%steps.n = getelementptr float, ptr %steps, i64 %of.row
br i1 %wide, label %f32, label %bf16
f32:
call void @row_f32(ptr %x.n, i64 %C, ptr %q.n, ptr %sums.n, ptr %steps.n, i64 %m)
br label %next
bf16:
call void @row_bf16(ptr %x.n, i64 %C, ptr %q.n, ptr %sums.n, ptr %steps.n, i64 %m)
br label %next
exit:
ret void
}
"""

_PRODUCT = """
define void @product(ptr %a) #0 {
entry:
$load_w
$load_scale
$load_bias
$load_to_bf16
$load_out
$load_q
$load_sums
$load_steps
$load_N
$load_C
$load_R
$load_threads
$at_blocks
$tiles
%all = udiv i64 %C, $step
%bytes = mul i64 %C, $column
%narrow = icmp ne i64 %to_bf16, 0
%size = select i1 %narrow, i64 2, i64 4
%row = mul i64 %R, %size
%R.up = add i64 %R, $last_of_block
%all.blocks = udiv i64 %R.up, $width
%parts = shl i64 %threads, 1
br label %next
next:
%seen = load atomic i64, ptr %blocks.at monotonic, align 8
br label %try
try:
%first.block = phi i64 [%seen, %next], [%found, %take]
%left.blocks = sub i64 %all.blocks, %first.block
%over = icmp sle i64 %left.blocks, 0
br i1 %over, label %exit, label %take
take:
%share = udiv i64 %left.blocks, %parts
%some = call i64 @llvm.smax.i64(i64 %share, i64 1)
%end.block = add i64 %first.block, %some
%taken = cmpxchg ptr %blocks.at, i64 %first.block, i64 %end.block monotonic monotonic
%found = extractvalue { i64, i1 } %taken, 0
%mine = extractvalue { i64, i1 } %taken, 1
br i1 %mine, label %block, label %try
block:
%b = phi i64 [%first.block, %take], [%b.next, %blocked]
%b.next = add i64 %b, 1
%r = mul i64 %b, $width
%w.offset = mul i64 %b, %bytes
%w.b = getelementptr i8, ptr %w, i64 %w.offset
%scale.b = getelementptr float, ptr %scale, i64 %r
%bias.b = getelementptr float, ptr %bias, i64 %r
%r.offset = mul i64 %r, %size
%out.b = getelementptr i8, ptr %out, i64 %r.offset
%left = sub i64 %R, %r
br label %tile
tile:
%t = phi i64 [0, %block], [%t.next, %tiled]
%first = phi i64 [0, %block], [%end, %tiled]
%t.next = add i64 %t, 1
%t.N = mul i64 %t.next, %N
%end = udiv i64 %t.N, %tiles
%m = sub i64 %end, %first
%q.offset = mul i64 %first, %C
%q.t = getelementptr i8, ptr %q, i64 %q.offset
%of.tile = mul i64 %first, %groups
%sums.t = getelementptr i32, ptr %sums, i64 %of.tile
%steps.t = getelementptr float, ptr %steps, i64 %of.tile
%out.offset = mul i64 %first, %row
%out.t = getelementptr i8, ptr %out.b, i64 %out.offset
switch i64 %m, label %tiled [
$cases
]
$calls
tiled:
%more = icmp slt i64 %end, %N
br i1 %more, label %tile, label %blocked
blocked:
%more.blocks = icmp slt i64 %b.next, %end.block
br i1 %more.blocks, label %block, label %next
exit:
ret void
}
"""

_RUN = """
define void @run(ptr %a) #0 {
entry:
$load_N
$load_threads
$load_parallel
%count = trunc i64 %threads to i32
%alone = icmp eq i64 %threads, 1
%few = icmp sle i64 %N, 2
%here = or i1 %alone, %few
br i1 %here, label %quantise.here, label %quantise.all
quantise.here:
call void @quantise(ptr %a)
br label %multiply
quantise.all:
call void %parallel(ptr @quantise, ptr %a, i32 %count, i32 0)
br label %multiply
multiply:
br i1 %alone, label %product.here, label %product.all
product.here:
call void @product(ptr %a)
ret void
product.all:
call void %parallel(ptr @product, ptr %a, i32 %count, i32 0)
ret void
}
"""
