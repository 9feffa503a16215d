"""README's table of families says what the tests show, no more and no less."""

import pytest

from ptuning.families import families
from tests.family_table import COLUMNS, READMES, ROOT, Shown, shown, table, with_table

HEADS = READMES["README.md"]


@pytest.mark.parametrize("name", READMES)
def test_the_table_is_that_of_the_tests(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == with_table(text, READMES[name], shown()), "run: python -m tests.family_table"


def test_a_test_that_is_gone_leaves_its_cell():
    tests = shown()
    gone = [one for one in tests if (one.family, one.feature) != ("chatglm2", "prefix")]
    assert len(gone) < len(tests) and table(HEADS, gone) != table(HEADS, tests)
    (line,) = (line for line in table(HEADS, gone).splitlines() if line.startswith("| chatglm2 "))
    assert line.split("|")[2 + COLUMNS.index("prefix")].strip() == "–"


def test_what_some_models_have_is_named():
    tests = [Shown("tests/a.py::test_b", "baichuan", "vLLM", "7B"), Shown("tests/c.py::test_d", "baichuan", "load")]
    text = table(HEADS, tests)
    assert '[7B](tests/a.py "test_b")' in text and '[✓](tests/c.py "test_d")' in text
    assert [f"| {family.name} |" in text for family in families()] == [True] * len(families())


def test_a_wrong_marker_is_named(tmp_path):
    file = tmp_path / "tests" / "test_x.py"
    file.parent.mkdir()
    file.write_text('@pytest.mark.works("chatglm2", "everything")\ndef test_y():\n    pass\n')
    with pytest.raises(
        ValueError, match=r"tests/test_x.py::test_y: .*everything.*: expected a family .* and some of load"
    ):
        shown(file.parent)
