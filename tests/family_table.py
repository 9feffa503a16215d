"""The table of README: families × what works. It is made of the tests that say so, by a marker:

    @pytest.mark.works("baichuan", "prefix", "LoRA")        of a family, by its name
    @pytest.mark.works("baichuan", "vLLM", only="7B")       of some of its models

`python -m tests.family_table` writes it into both READMEs; tests/test_family_table.py fails where they differ from the tests.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptuning.families import families

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("load", "prefix", "LoRA", "full", "int8", "int4", "NF4", "engine", "vLLM", "32k")
READMES = {
    "README.md": ("family", *COLUMNS),
    "README.zh.md": ("模型族", "加载", "prefix", "LoRA", "全参数", "int8", "int4", "NF4", "引擎", "vLLM", "32k"),
}
BEGIN, END = "<!-- families: python -m tests.family_table -->\n", "<!-- /families -->\n"


@dataclass(frozen=True)
class Shown:
    """What one test shows.

    Args:
        place: of the test, `tests/x/test_y.py::test_z`.
        only: models of the family; empty: all.
    """

    place: str
    family: str
    feature: str
    only: str = ""


def shown(folder: Path = ROOT / "tests") -> list[Shown]:
    """Of all tests, in the order of files and lines.

    Raises:
        ValueError: a marker that isn't `works(family, feature, …, only="…")`.
    """
    found = []
    for file in sorted(folder.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "mark.works(" not in text:
            continue
        place = file.relative_to(folder.parent).as_posix()
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef):
                for mark in function.decorator_list:
                    found += _of_mark(f"{place}::{function.name}", mark)
    return found


def _of_mark(place: str, mark: ast.expr) -> Iterator[Shown]:
    if not (isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("mark.works")):
        return
    family, *features = (ast.literal_eval(value) for value in mark.args)
    more = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in mark.keywords}
    known = {family.name for family in families()}
    if family not in known or not features or not set(features) <= set(COLUMNS) or not more.keys() <= {"only"}:
        raise ValueError(
            f"{place}: {ast.unparse(mark)}: expected a family ({', '.join(sorted(known))}) and some of {', '.join(COLUMNS)}"
        )
    for feature in features:
        yield Shown(place, family, feature, more.get("only", ""))


def table(heads: Sequence[str], tests: list[Shown]) -> str:
    """A line a family, in which each cell leads to the first test that shows it.

    Args:
        heads: of the columns, the families' first.
    """
    lines = [f"| {' | '.join(heads)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in families():
        cells = [_cell([one for one in tests if (one.family, one.feature) == (family.name, name)]) for name in COLUMNS]
        lines.append(f"| {' | '.join((family.name, *cells))} |")
    return "\n".join(lines) + "\n"


def _cell(tests: list[Shown]) -> str:
    # One that shows it for all models goes before those of some.
    if not tests:
        return "–"
    first = min(tests, key=lambda one: bool(one.only))
    file, _, name = first.place.partition("::")
    return f'[{first.only or "✓"}]({file} "{name}")'


def with_table(text: str, heads: Sequence[str], tests: list[Shown]) -> str:
    """A README's text with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no table: a README needs the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table(heads, tests) + END + after


def main() -> None:
    tests = shown()
    for name, heads in READMES.items():
        path = ROOT / name
        path.write_text(with_table(path.read_text(encoding="utf-8"), heads, tests), encoding="utf-8")


if __name__ == "__main__":
    main()
