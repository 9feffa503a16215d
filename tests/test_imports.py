"""The import order that ptuning/__init__.py states."""

import ast
import re
from pathlib import Path

import ptuning

PACKAGE = Path(ptuning.__file__).parent


def stated_order() -> list[str]:
    line = " ".join(line for line in ptuning.__doc__.splitlines() if "←" in line)
    return re.findall(r"\w+", line)


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "ptuning" else [f"ptuning.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("ptuning.")}
    return found


def test_every_part_is_in_the_order():
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert parts - {"__init__", "__pycache__", "py"} == set(stated_order())


def test_imports_point_one_way():
    order = stated_order()
    wrong = []
    for part in order:
        path = PACKAGE / f"{part}.py"
        files = [path] if path.exists() else sorted((PACKAGE / part).rglob("*.py"))
        assert files, part
        for file in files:
            later = [name for name in imported_parts(file) if order.index(name) > order.index(part)]
            wrong += [f"{file.relative_to(PACKAGE)} imports {name}" for name in later]
    assert not wrong


def test_modules_stay_small():
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_only_families_know_a_family_only_methods_a_method_and_only_quantization_a_precision():
    """Composition (main, cli) and what is made for one method's format may name it; nothing else asks which one it is."""
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        text = file.read_text(encoding="utf-8")
        if not place.startswith("families/") and re.search(
            r"ptuning\.families\.(?:\w+2|baichuan|glm130b)\b|(?:ChatGLM|Baichuan|GLM130B)\w*(?:Config|Tokenizer|For)",
            text,
        ):
            wrong.append(f"{place} names a family")
        if not place.startswith("methods/") and re.search(r"\bprefix_of\(|method(?:\.name)? [!=]= ", text):
            wrong.append(f"{place} asks which method it is")
        if not place.startswith("quantization/") and re.search(r"\b(?:Nf4|Int8|Int4)\b|bits [!=]= \d|[!=]= .nf4", text):
            wrong.append(f"{place} asks which precision it is")
    assert not wrong
