"""The committed demo data are what their scripts write, and the base has seen nothing of what it is judged on."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"advertise": (5000, 320), "dialogue": (600, 60)}
GARMENT_LISTS = ("衣样式#", "裙型#", "裤型#", "类型#上衣", "类型#裙", "类型#裤")


def run(script: str, *args: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *args], check=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """The whole pretraining text."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    run("models/recipe/corpus.py", "--out", str(path))
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SIZES)
def test_generator_reproduces_the_committed_files(name, tmp_path):
    run(f"data/recipe/{name}.py", "--out", str(tmp_path))
    for file in ("train.json", "dev.json"):
        assert (tmp_path / file).read_bytes() == (ROOT / "data" / name / file).read_bytes()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_no_dev_row_in_train(name):
    train, dev = (read(ROOT / "data" / name / file) for file in ("train.json", "dev.json"))
    assert (len(train), len(dev)) == SIZES[name]
    fields = ("content",) if name == "advertise" else ("history", "prompt")
    train_questions, dev_questions = ({str([one[f] for f in fields]) for one in part} for part in (train, dev))
    assert len(dev_questions) == len(dev) and len(train_questions) == len(train)
    assert not train_questions & dev_questions


def test_a_summary_names_every_attribute_but_the_kind():
    for one in read(ROOT / "data/advertise/dev.json"):
        values = [pair.split("#")[1] for pair in one["content"].split("*")[1:]]
        assert all(value in one["summary"] for value in values)


def test_most_dialogues_have_a_history():
    assert all(one["history"] for one in read(ROOT / "data/dialogue/dev.json"))


def found(texts: Iterable[str], corpus: str, beginning: int) -> set[str]:
    """Those that stand in the corpus, in one pass over it instead of one for each.

    Args:
        beginning: so many characters of a text are looked up at each place of the corpus.
    """
    starts, seen = defaultdict(list), set()
    for text in texts:
        if len(text) >= beginning:
            starts[text[:beginning]].append(text)
        elif text in corpus:
            seen.add(text)
    for at in range(len(corpus)):
        for text in starts.get(corpus[at : at + beginning], ()):
            if corpus.startswith(text, at):
                seen.add(text)
    return seen


def test_pretraining_text_has_no_advertisement(corpus):
    rows = [one for file in ("train.json", "dev.json") for one in read(ROOT / "data/advertise" / file)]
    assert not found((one[field] for one in rows for field in ("content", "summary")), corpus, 8)
    assert not [key for key in GARMENT_LISTS if key in corpus]


def test_pretraining_text_has_hardly_a_clause_of_the_copy(corpus):
    """What they share are the adjectives, which the base knows from plain questions about clothes."""
    rows = read(ROOT / "data/advertise/train.json")
    clauses = {clause for one in rows for clause in one["summary"].rstrip("。").split("，")}
    shared = found(clauses, corpus, 4)
    assert shared  # the adjectives
    assert len(shared) <= 0.05 * len(clauses)
    assert sum(len(clause) >= 7 for clause in shared) <= 2


def test_corpus_is_deterministic_and_grows_at_the_end(corpus, tmp_path):
    path = tmp_path / "short.jsonl"
    run("models/recipe/corpus.py", "--rows", "500", "--out", str(path))
    assert corpus.startswith(path.read_text(encoding="utf-8"))
