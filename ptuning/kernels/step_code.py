"""What lies between the products of a decode step, as text for LLVM: each function does its work on as many threads as call it, row
by row, so that a row alone equals the row in a batch.

A program is a list of records: a function's address, whether all threads wait for each other behind it, and what the function is
told (`SLOTS` numbers of 64 bit, of which the last two are counters that begin at 0).

Numbers are bf16 and rounded where transformers' own modules round, or kept in fp32 longer. Shapes: N rows of one token each, H
numbers a token, G key/value groups of P heads of D numbers, F feed-forward width.
"""

from __future__ import annotations

from string import Template

from ptuning.kernels.attend_code import ATTEND, attend
from ptuning.quantization.llvm import ATTRIBUTES, declare, exponential, loads, narrow, rounded, splat, wide

SLOTS = 18
RECORD = 2 + SLOTS
MULTIPLE = 16  # of H, D, F and the rotary's width
CHUNK = 2048  # of F that a thread takes at a time
_COUNTERS = f"""%next.at = getelementptr i64, ptr %a, i64 {SLOTS - 2}
%entered.at = getelementptr i64, ptr %a, i64 {SLOTS - 1}"""

# What each function is told; addresses first.
NORM = ("x", "add", "weight", "out", "N", "H", "epsilon")
ROTATE = (
    *("queries", "new_keys", "new_values", "cos", "sin", "keys", "values", "columns"),
    *("slot", "group", "N", "G", "heads", "D", "rotary"),
)
GATE = ("x", "out", "N", "F")
_ADDRESSES = {NORM: 4, ROTATE: 8, ATTEND: 6, GATE: 2}


def source(lanes: int) -> str:
    """A module with `run(program)` and the functions `norm`, `rotate`, `attend`, `gate`.

    A program: threads, address of OpenMP's parallel, address of its barrier, number of records, records.

    Args:
        lanes: numbers of 32 bit in the processor's registers.
    """
    parts = [declare(16), ATTRIBUTES, _DECLARATIONS, _RUN, _norm(), _rotate(), attend(lanes, _told(ATTEND)), _gate()]
    return "\n".join(parts)


def _told(arguments: tuple[str, ...]) -> str:
    words = loads(arguments, _ADDRESSES[arguments])
    return "\n".join([*(words[f"load_{name}"] for name in arguments), _COUNTERS])


_DECLARATIONS = """
declare i64 @llvm.smin.i64(i64, i64)
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
"""

_RUN = Template(
    """
define void @nothing() {
ret void
}
define void @work(ptr %program) #0 {
entry:
%barrier.at = getelementptr i64, ptr %program, i64 2
%barrier = load ptr, ptr %barrier.at
%count.at = getelementptr i64, ptr %program, i64 3
%count = load i64, ptr %count.at
%records = getelementptr i64, ptr %program, i64 4
br label %one
one:
%i = phi i64 [0, %entry], [%i.next, %done]
%offset = mul i64 %i, $record
%r = getelementptr i64, ptr %records, i64 %offset
%function = load ptr, ptr %r
%wait.at = getelementptr i64, ptr %r, i64 1
%wait = load i64, ptr %wait.at
%arguments = getelementptr i64, ptr %r, i64 2
call void %function(ptr %arguments)
%waits = icmp ne i64 %wait, 0
br i1 %waits, label %meet, label %done
meet:
call void %barrier()
br label %done
done:
%i.next = add i64 %i, 1
%more = icmp slt i64 %i.next, %count
br i1 %more, label %one, label %exit
exit:
ret void
}
define void @run(ptr %program) #0 {
entry:
%threads = load i64, ptr %program
%parallel.at = getelementptr i64, ptr %program, i64 1
%parallel = load ptr, ptr %parallel.at
%count.at = getelementptr i64, ptr %program, i64 3
%count = load i64, ptr %count.at
%records = getelementptr i64, ptr %program, i64 4
br label %clear
clear:
%i = phi i64 [0, %entry], [%i.next, %clear]
%i.next = add i64 %i, 1
%end = mul i64 %i.next, $record
%last = sub i64 %end, 2
%counters = getelementptr i64, ptr %records, i64 %last
store <2 x i64> zeroinitializer, ptr %counters, align 8
%more = icmp slt i64 %i.next, %count
br i1 %more, label %clear, label %cleared
cleared:
%alone = icmp eq i64 %threads, 1
br i1 %alone, label %here, label %all
here:
call void @work(ptr %program)
ret void
all:
%several = trunc i64 %threads to i32
call void %parallel(ptr @work, ptr %program, i32 %several, i32 0)
ret void
}
"""
).substitute(record=RECORD)


def _norm() -> str:
    """x += add (where there is one); out = x / sqrt(Σx² / H + ε) · weight."""
    return f"""
define void @norm(ptr %a) #0 {{
entry:
{_told(NORM)}
%epsilon.32 = trunc i64 %epsilon to i32
%epsilon.f = bitcast i32 %epsilon.32 to float
%H.f = sitofp i64 %H to float
%bytes = shl i64 %H, 1
%adds = icmp ne ptr %add, null
br label %next
next:
%n = atomicrmw add ptr %next.at, i64 1 monotonic
%over = icmp sge i64 %n, %N
br i1 %over, label %exit, label %row
row:
%offset = mul i64 %n, %bytes
%x.n = getelementptr i8, ptr %x, i64 %offset
%out.n = getelementptr i8, ptr %out, i64 %offset
br i1 %adds, label %sum, label %square
sum:
%j = phi i64 [0, %row], [%j.next, %sum]
%xj.at = getelementptr i16, ptr %x.n, i64 %j
{wide("%xj", "%xj.at")}
%add.n = getelementptr i8, ptr %add, i64 %offset
%aj.at = getelementptr i16, ptr %add.n, i64 %j
{wide("%aj", "%aj.at")}
%both = fadd <16 x float> %xj, %aj
{narrow("%s", "%both")}
store <16 x i16> %s, ptr %xj.at, align 2
%j.next = add i64 %j, 16
%more.j = icmp slt i64 %j.next, %H
br i1 %more.j, label %sum, label %square
square:
%k = phi i64 [0, %row], [0, %sum], [%k.next, %square]
%squares = phi <16 x float> [zeroinitializer, %row], [zeroinitializer, %sum], [%squares.next, %square]
%xk.at = getelementptr i16, ptr %x.n, i64 %k
{wide("%xk", "%xk.at")}
%squares.next = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %xk, <16 x float> %xk, <16 x float> %squares)
%k.next = add i64 %k, 16
%more.k = icmp slt i64 %k.next, %H
br i1 %more.k, label %square, label %squared
squared:
%total = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %squares.next)
%mean = fdiv float %total, %H.f
%variance = fadd float %mean, %epsilon.f
%root = call float @llvm.sqrt.f32(float %variance)
%r = fdiv float 1.0, %root
{splat("%factors", "%r", "float", 16)}
br label %scale
scale:
%i = phi i64 [0, %squared], [%i.next, %scale]
%xi.at = getelementptr i16, ptr %x.n, i64 %i
{wide("%xi", "%xi.at")}
%scaled = fmul <16 x float> %xi, %factors
{rounded("%normal", "%scaled")}
%wi.at = getelementptr i16, ptr %weight, i64 %i
{wide("%wi", "%wi.at")}
%weighted = fmul <16 x float> %wi, %normal
{narrow("%y", "%weighted")}
%out.i = getelementptr i16, ptr %out.n, i64 %i
store <16 x i16> %y, ptr %out.i, align 2
%i.next = add i64 %i, 16
%more.i = icmp slt i64 %i.next, %H
br i1 %more.i, label %scale, label %next
exit:
ret void
}}"""


def _rotate() -> str:
    """Turns the first `rotary` numbers of each head of queries, where they are, and of keys, in pairs; writes keys and
    values into each row's next column. cos and sin have each number twice."""
    pairs = ", ".join(f"i32 {n ^ 1}" for n in range(16))
    signs = ", ".join(f"float {(-1.0, 1.0)[n % 2]}" for n in range(16))
    return f"""
define internal void @turn(ptr %from, ptr %to, ptr %cos, ptr %sin, i64 %rotary, i64 %D) #0 {{
entry:
%some = icmp sgt i64 %rotary, 0
br i1 %some, label %turn, label %rest
turn:
%i = phi i64 [0, %entry], [%i.next, %turn]
%from.i = getelementptr i16, ptr %from, i64 %i
{wide("%x", "%from.i")}
%cos.i = getelementptr i16, ptr %cos, i64 %i
{wide("%c", "%cos.i")}
%sin.i = getelementptr i16, ptr %sin, i64 %i
{wide("%s", "%sin.i")}
%other = shufflevector <16 x float> %x, <16 x float> poison, <16 x i32> <{pairs}>
%half = fmul <16 x float> %other, <{signs}>
%along.32 = fmul <16 x float> %x, %c
{rounded("%along", "%along.32")}
%across.32 = fmul <16 x float> %half, %s
{rounded("%across", "%across.32")}
%turned = fadd <16 x float> %along, %across
{narrow("%y", "%turned")}
%to.i = getelementptr i16, ptr %to, i64 %i
store <16 x i16> %y, ptr %to.i, align 2
%i.next = add i64 %i, 16
%more.i = icmp slt i64 %i.next, %rotary
br i1 %more.i, label %turn, label %rest
rest:
%left = icmp slt i64 %rotary, %D
br i1 %left, label %copy, label %exit
copy:
%j = phi i64 [%rotary, %rest], [%j.next, %copy]
%from.j = getelementptr i16, ptr %from, i64 %j
%same = load <16 x i16>, ptr %from.j, align 2
%to.j = getelementptr i16, ptr %to, i64 %j
store <16 x i16> %same, ptr %to.j, align 2
%j.next = add i64 %j, 16
%more.j = icmp slt i64 %j.next, %D
br i1 %more.j, label %copy, label %exit
exit:
ret void
}}
define void @rotate(ptr %a) #0 {{
entry:
{_told(ROTATE)}
%head.bytes = shl i64 %D, 1
%rotary.bytes = shl i64 %rotary, 1
br label %next
next:
%n = atomicrmw add ptr %next.at, i64 1 monotonic
%over = icmp sge i64 %n, %N
br i1 %over, label %exit, label %row
row:
%turn.offset = mul i64 %n, %rotary.bytes
%cos.n = getelementptr i8, ptr %cos, i64 %turn.offset
%sin.n = getelementptr i8, ptr %sin, i64 %turn.offset
%first = mul i64 %n, %heads
br label %query
query:
%h = phi i64 [0, %row], [%h.next, %query]
%head = add i64 %first, %h
%q.offset = mul i64 %head, %head.bytes
%q = getelementptr i8, ptr %queries, i64 %q.offset
call void @turn(ptr %q, ptr %q, ptr %cos.n, ptr %sin.n, i64 %rotary, i64 %D)
%h.next = add i64 %h, 1
%more.h = icmp slt i64 %h.next, %heads
br i1 %more.h, label %query, label %write
write:
%column.at = getelementptr i64, ptr %columns, i64 %n
%column = load i64, ptr %column.at
%slot.offset = mul i64 %n, %slot
%column.offset = mul i64 %column, %head.bytes
%place = add i64 %slot.offset, %column.offset
%first.group = mul i64 %n, %G
br label %key
key:
%g = phi i64 [0, %write], [%g.next, %key]
%new = add i64 %first.group, %g
%new.offset = mul i64 %new, %head.bytes
%k = getelementptr i8, ptr %new_keys, i64 %new.offset
%v = getelementptr i8, ptr %new_values, i64 %new.offset
%group.offset = mul i64 %g, %group
%to = add i64 %place, %group.offset
%k.to = getelementptr i8, ptr %keys, i64 %to
%v.to = getelementptr i8, ptr %values, i64 %to
call void @turn(ptr %k, ptr %k.to, ptr %cos.n, ptr %sin.n, i64 %rotary, i64 %D)
call void @turn(ptr %v, ptr %v.to, ptr %cos.n, ptr %sin.n, i64 0, i64 %D)
%g.next = add i64 %g, 1
%more.g = icmp slt i64 %g.next, %G
br i1 %more.g, label %key, label %next
exit:
ret void
}}"""


def _gate() -> str:
    """out = silu(first half of x) · second half."""
    return f"""
define void @gate(ptr %a) #0 {{
entry:
{_told(GATE)}
%F.up = add i64 %F, {CHUNK - 1}
%chunks = udiv i64 %F.up, {CHUNK}
%all = mul i64 %N, %chunks
br label %next
next:
%t = atomicrmw add ptr %next.at, i64 1 monotonic
%over = icmp sge i64 %t, %all
br i1 %over, label %exit, label %chunk
chunk:
%n = udiv i64 %t, %chunks
%c = urem i64 %t, %chunks
%first = mul i64 %c, {CHUNK}
%longest = add i64 %first, {CHUNK}
%end = call i64 @llvm.smin.i64(i64 %longest, i64 %F)
%n.F = mul i64 %n, %F
%out.n = getelementptr i16, ptr %out, i64 %n.F
%n.2F = shl i64 %n.F, 1
%gate.n = getelementptr i16, ptr %x, i64 %n.2F
%up.n = getelementptr i16, ptr %gate.n, i64 %F
br label %numbers
numbers:
%i = phi i64 [%first, %chunk], [%i.next, %numbers]
%gate.i = getelementptr i16, ptr %gate.n, i64 %i
{wide("%g", "%gate.i")}
%up.i = getelementptr i16, ptr %up.n, i64 %i
{wide("%u", "%up.i")}
%minus = fneg <16 x float> %g
{exponential("%e", "%minus")}
%below = fadd <16 x float> %e, splat (float 1.0)
%silu.32 = fdiv <16 x float> %g, %below
{rounded("%silu", "%silu.32")}
%product = fmul <16 x float> %silu, %u
{narrow("%y", "%product")}
%out.i = getelementptr i16, ptr %out.n, i64 %i
store <16 x i16> %y, ptr %out.i, align 2
%i.next = add i64 %i, 16
%more = icmp slt i64 %i.next, %end
br i1 %more, label %numbers, label %next
exit:
ret void
}}"""
