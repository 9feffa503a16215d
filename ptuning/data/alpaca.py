"""Alpaca rows: `instruction` and `output`, with an optional `input`, `history` and `system`.

The question is the instruction, followed by a line break and the input where there is one.
"""

from __future__ import annotations

from typing import ClassVar, cast

from ptuning.data.columns import absent_fault
from ptuning.data.record import Record
from ptuning.data.rows import Row
from ptuning.data.values import Fault, history_fault, history_pairs, optional_text_fault, text_fault


class Alpaca:
    """Reads the names that stanford_alpaca gave; `history` and `system` are those of later collections."""

    json_columns: ClassVar[tuple[str, ...]] = ("history",)
    needed: ClassVar[list[tuple[str, str]]] = [("--data_format", "instruction"), ("--data_format", "output")]

    def __str__(self) -> str:
        return "Alpaca instruction, input, output"

    def read(self, row: Row, source: str) -> Record | list[tuple[str, Fault]]:
        faults = []
        for name in ("instruction", "output"):
            if name not in row:
                faults.append((name, absent_fault(row)))
            elif fault := text_fault(row[name]):
                faults.append((name, fault))
        for name in ("input", "system"):
            if fault := optional_text_fault(row.get(name)):
                faults.append((name, fault))
        if fault := history_fault(row.get("history")):
            faults.append(("history", fault))
        if faults:
            return faults
        question, context = cast(str, row["instruction"]), cast("str | None", row.get("input"))
        system = cast("str | None", row.get("system"))
        return Record(
            prompt=f"{question}\n{context}" if context and context.strip() else question,
            response=cast(str, row["output"]),
            history=history_pairs(row.get("history")),
            source=source,
            system=system if system and system.strip() else None,
        )
