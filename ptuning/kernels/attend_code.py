"""Attention of single tokens on their rows' keys and values, as text for LLVM.

A thread takes a row's group of heads, `lanes` of them at a time: a register holds one number of each head, so that keys and values
are read once for all of them and no sum runs across a register. Everything is fp32 but what lies in memory.

Shapes: N rows, G key/value groups of P heads, D head dimension, C columns of a row.
"""

from __future__ import annotations

from string import Template

from ptuning.quantization.llvm import call, declare, each, exponential, narrow, splat, wide

# What `attend` is told; addresses first. Distances in bytes: `row` and `head` of queries, `slot` and `group` of keys and values.
ATTEND = (
    *("queries", "keys", "values", "lengths", "out", "room"),
    *("row", "head", "slot", "group", "N", "G", "P", "D", "scaling", "room_bytes"),
)
_BLOCK = 256  # columns of values that are added up for all numbers of a head before the next ones: they stay in a cache
_TOGETHER = 4  # keys that are multiplied with queries at a time


def room_bytes(columns: int, head_dim: int, lanes: int) -> int:
    """What each thread needs to work in, for rows of so many columns."""
    floats = 2 * head_dim * lanes + _TOGETHER * head_dim + (columns + _TOGETHER) * lanes
    return -(-4 * floats // 64) * 64


def attend(lanes: int, told: str) -> str:
    """queries (N, G P, D) bf16, keys and values (N, G, C, D) bf16 → out (N, G P, D) bf16, `lengths` columns of each row in use.

    Args:
        lanes: numbers of 32 bit in a register.
        told: loads the arguments.
    """
    vector, keys, heads = f"<{lanes} x float>", range(_TOGETHER), range(lanes)
    largest = ["%largest", *(f"%largest{i}" for i in keys[1:]), "%largest.next"]
    words = {
        "declarations": "" if lanes == 16 else declare(lanes),
        "told": told,
        "lanes": lanes,
        "less": lanes - 1,
        "vector": vector,
        "block": _BLOCK,
        "together": _TOGETHER,
        "places": each(_PLACES, i=keys),
        "widened": each(_WIDENED + wide("%wide{i}", "%wide{i}.at") + _WIDENED_TO, i=keys),
        "score_phis": each(
            f"%score{{i}} = phi {vector} [zeroinitializer, %widen], [%score{{i}}.next, %multiply]", i=keys
        ),
        "multiplied": each(
            _KEY
            + splat("%keys{i}", "%key{i}", "float", lanes)
            + "\n%score{i}.next = "
            + call("fmuladd", lanes, "%keys{i}", "%qd", "%score{i}"),
            i=keys,
        ),
        "store_scores": each(_STORE_SCORE, i=keys).replace("LANES", str(lanes)),
        "largest": "\n".join(
            f"{largest[i + 1]} = {call('maximum', lanes, largest[i], f'%score{i}.next')}" for i in keys
        ),
        "weights": exponential("%e", "%below", lanes),
        "load_sums": each(_LOAD_SUM, h=heads).replace("LANES", str(lanes)),
        "sum_phis": each(f"%sum{{h}} = phi {vector} [%sum{{h}}.0, %numbers], [%sum{{h}}.next, %column]", h=heads),
        "value": wide("%value", "%v.at", lanes),
        "added": each(
            _WEIGHT
            + splat("%weight{h}", "%p{h}", "float", lanes)
            + "\n%sum{h}.next = "
            + call("fmuladd", lanes, "%weight{h}", "%value", "%sum{h}"),
            h=heads,
        ),
        "store_sums": each(f"store {vector} %sum{{h}}.next, ptr %sum.at{{h}}, align 4", h=heads),
        "by": splat("%by", "%inverse.h", "float", lanes),
        "rounded": narrow("%y", "%y.32", lanes),
    }
    return Template(_ATTEND).substitute(words)


_PLACES = """%c{i} = add i64 %c, {i}
%column{i} = call i64 @llvm.smin.i64(i64 %c{i}, i64 %last)
%k{i}.offset = mul i64 %column{i}, %D.bytes
%k{i} = getelementptr i8, ptr %k, i64 %k{i}.offset
%to{i}.offset = mul i64 %D, {i}
%to{i} = getelementptr float, ptr %k.room, i64 %to{i}.offset"""

_WIDENED = "%wide{i}.at = getelementptr i16, ptr %k{i}, i64 %d1\n"
_WIDENED_TO = """
%wide{i}.to = getelementptr float, ptr %to{i}, i64 %d1
store <16 x float> %wide{i}, ptr %wide{i}.to, align 4"""

_KEY = """%key{i}.at = getelementptr float, ptr %to{i}, i64 %d2
%key{i} = load float, ptr %key{i}.at
"""

_STORE_SCORE = """%score.offset{i} = mul i64 %c{i}, LANES
%score.at{i} = getelementptr float, ptr %scores, i64 %score.offset{i}
store <LANES x float> %score{i}.next, ptr %score.at{i}, align 4"""

_LOAD_SUM = """%sum.at{h} = getelementptr <LANES x float>, ptr %sums.at, i64 {h}
%sum{h}.0 = load <LANES x float>, ptr %sum.at{h}, align 4"""

_WEIGHT = """%p.at{h} = getelementptr float, ptr %p.at, i64 {h}
%p{h} = load float, ptr %p.at{h}
"""

_ATTEND = """$declarations
define void @attend(ptr %a) #0 {
entry:
$told
%scaling.32 = trunc i64 %scaling to i32
%scale = bitcast i32 %scaling.32 to float
%P.up = add i64 %P, $less
%parts = udiv i64 %P.up, $lanes
%of.row = mul i64 %G, %parts
%all = mul i64 %N, %of.row
%heads = mul i64 %G, %P
%D.last = sub i64 %D, 1
%lane.numbers = mul i64 %D, $lanes
%mine = atomicrmw add ptr %entered.at, i64 1 monotonic
%room.offset = mul i64 %mine, %room_bytes
%q.room = getelementptr i8, ptr %room, i64 %room.offset
%sum.room = getelementptr float, ptr %q.room, i64 %lane.numbers
%k.room = getelementptr float, ptr %sum.room, i64 %lane.numbers
%k.numbers = mul i64 %D, $together
%scores = getelementptr float, ptr %k.room, i64 %k.numbers
br label %next
next:
%t = atomicrmw add ptr %next.at, i64 1 monotonic
%over = icmp sge i64 %t, %all
br i1 %over, label %exit, label %task
task:
%n = udiv i64 %t, %of.row
%in.row = urem i64 %t, %of.row
%g = udiv i64 %in.row, %parts
%part = urem i64 %in.row, %parts
%skipped = mul i64 %part, $lanes
%left = sub i64 %P, %skipped
%real = call i64 @llvm.smin.i64(i64 %left, i64 $lanes)
%g.P = mul i64 %g, %P
%first.head = add i64 %g.P, %skipped
%q.row = mul i64 %n, %row
%q.heads = mul i64 %first.head, %head
%q.offset = add i64 %q.row, %q.heads
%q = getelementptr i8, ptr %queries, i64 %q.offset
%slot.offset = mul i64 %n, %slot
%group.offset = mul i64 %g, %group
%kv.offset = add i64 %slot.offset, %group.offset
%k = getelementptr i8, ptr %keys, i64 %kv.offset
%v = getelementptr i8, ptr %values, i64 %kv.offset
%length.at = getelementptr i64, ptr %lengths, i64 %n
%length = load i64, ptr %length.at
%last = sub i64 %length, 1
br label %lane
lane:
%lane.i = phi i64 [0, %task], [%lane.next, %laned]
%is.real = icmp slt i64 %lane.i, %real
%head.offset = mul i64 %lane.i, %head
%q.head = getelementptr i8, ptr %q, i64 %head.offset
br label %turn
turn:
%d0 = phi i64 [0, %lane], [%d0.next, %turned]
br i1 %is.real, label %of.head, label %turned
of.head:
%q.at = getelementptr i16, ptr %q.head, i64 %d0
%q.16 = load i16, ptr %q.at, align 2
%q.32 = zext i16 %q.16 to i32
%q.bits = shl i32 %q.32, 16
%q.number = bitcast i32 %q.bits to float
%q.scaled = fmul float %q.number, %scale
br label %turned
turned:
%q.value = phi float [0.0, %turn], [%q.scaled, %of.head]
%q.row.of = mul i64 %d0, $lanes
%q.to.of = add i64 %q.row.of, %lane.i
%q.to = getelementptr float, ptr %q.room, i64 %q.to.of
store float %q.value, ptr %q.to
%s.to = getelementptr float, ptr %sum.room, i64 %q.to.of
store float 0.0, ptr %s.to
%d0.next = add i64 %d0, 1
%more.d0 = icmp slt i64 %d0.next, %D
br i1 %more.d0, label %turn, label %laned
laned:
%lane.next = add i64 %lane.i, 1
%more.lanes = icmp slt i64 %lane.next, $lanes
br i1 %more.lanes, label %lane, label %keys.begin
keys.begin:
%D.bytes = shl i64 %D, 1
br label %some.keys
some.keys:
%c = phi i64 [0, %keys.begin], [%c.next, %scored]
%largest = phi $vector [splat (float 0xFFF0000000000000), %keys.begin], [%largest.next, %scored]
$places
br label %widen
widen:
%d1 = phi i64 [0, %some.keys], [%d1.next, %widen]
$widened
%d1.next = add i64 %d1, 16
%more.d1 = icmp slt i64 %d1.next, %D
br i1 %more.d1, label %widen, label %multiply
multiply:
%d2 = phi i64 [0, %widen], [%d2.next, %multiply]
$score_phis
%qd.offset = mul i64 %d2, $lanes
%qd.at = getelementptr float, ptr %q.room, i64 %qd.offset
%qd = load $vector, ptr %qd.at, align 4
$multiplied
%d2.next = add i64 %d2, 1
%more.d2 = icmp slt i64 %d2.next, %D
br i1 %more.d2, label %multiply, label %scored
scored:
$store_scores
$largest
%c.next = add i64 %c, $together
%more.c = icmp slt i64 %c.next, %length
br i1 %more.c, label %some.keys, label %weigh
weigh:
%w = phi i64 [0, %scored], [%w.next, %weigh]
%total = phi $vector [zeroinitializer, %scored], [%total.next, %weigh]
%w.offset = mul i64 %w, $lanes
%w.at = getelementptr float, ptr %scores, i64 %w.offset
%score = load $vector, ptr %w.at, align 4
%below = fsub $vector %score, %largest.next
$weights
store $vector %e, ptr %w.at, align 4
%total.next = fadd $vector %total, %e
%w.next = add i64 %w, 1
%more.w = icmp slt i64 %w.next, %length
br i1 %more.w, label %weigh, label %block
block:
%b = phi i64 [0, %weigh], [%b.end, %blocked]
%b.longest = add i64 %b, $block
%b.end = call i64 @llvm.smin.i64(i64 %b.longest, i64 %length)
br label %numbers
numbers:
%d3 = phi i64 [0, %block], [%d3.next, %added]
%sums.offset = mul i64 %d3, $lanes
%sums.at = getelementptr float, ptr %sum.room, i64 %sums.offset
$load_sums
br label %column
column:
%col = phi i64 [%b, %numbers], [%col.next, %column]
$sum_phis
%v.column = mul i64 %col, %D
%v.of = add i64 %v.column, %d3
%v.at = getelementptr i16, ptr %v, i64 %v.of
$value
%p.offset = mul i64 %col, $lanes
%p.at = getelementptr float, ptr %scores, i64 %p.offset
$added
%col.next = add i64 %col, 1
%more.col = icmp slt i64 %col.next, %b.end
br i1 %more.col, label %column, label %added
added:
$store_sums
%d3.next = add i64 %d3, $lanes
%more.d3 = icmp slt i64 %d3.next, %D
br i1 %more.d3, label %numbers, label %blocked
blocked:
%more.b = icmp slt i64 %b.end, %length
br i1 %more.b, label %block, label %divide
divide:
%inverse = fdiv $vector splat (float 1.0), %total.next
store $vector %inverse, ptr %q.room, align 4
%n.heads = mul i64 %n, %heads
%out.head = add i64 %n.heads, %first.head
br label %write
write:
%h = phi i64 [0, %divide], [%h.next, %written]
%inverse.at = getelementptr float, ptr %q.room, i64 %h
%inverse.h = load float, ptr %inverse.at
$by
%out.of = add i64 %out.head, %h
%out.offset = mul i64 %out.of, %D
%out.h = getelementptr i16, ptr %out, i64 %out.offset
br label %some
some:
%d4 = phi i64 [0, %write], [%d4.next, %some]
%s.row = mul i64 %d4, $lanes
%s.of = mul i64 %h, $lanes
%s.offset = add i64 %s.row, %s.of
%s.at = getelementptr float, ptr %sum.room, i64 %s.offset
%s = load $vector, ptr %s.at, align 4
%y.32 = fmul $vector %s, %by
$rounded
%out.d = getelementptr i16, ptr %out.h, i64 %d4
store <$lanes x i16> %y, ptr %out.d, align 2
%d4.next = add i64 %d4, $lanes
%more.d4 = icmp slt i64 %d4.next, %D
br i1 %more.d4, label %some, label %written
written:
%h.next = add i64 %h, 1
%more.h = icmp slt i64 %h.next, %real
br i1 %more.h, label %write, label %next
exit:
ret void
}"""
