"""The forgetting probe."""

import json
import math
from collections import Counter

import pytest
import torch

from ptuning import load_model
from ptuning.data.encode import IGNORE, Encoder, Lengths
from ptuning.errors import DataError
from ptuning.evaluation.losses import answer_losses
from ptuning.evaluation.probe import (
    KINDS,
    ProbeQuestion,
    Prober,
    probe_base,
    probe_records,
    probe_rows,
    probe_summary,
    probe_tuned,
    read_probe,
    read_probe_base,
    side_by_side,
)
from ptuning.families import family_of
from ptuning.methods.prefix.attach import attach_encoder, attach_prefix, detach_prefix
from ptuning.runs.folder import PROBE_BASE
from ptuning.runs.lines import write_lines
from tests.conftest import REPO

QUESTIONS = [ProbeQuestion(kind, f"问题{i}？", f"probe.jsonl:{i + 1}") for i, kind in enumerate(KINDS)]


def test_the_questions_in_the_repository():
    questions = read_probe()
    kinds = Counter(question.kind for question in questions)
    assert len(questions) == 72 and set(kinds) == set(KINDS) and min(kinds.values()) >= 15
    prompts = [question.prompt for question in questions]
    assert len(set(prompts)) == 72
    assert all(prompt == prompt.strip() and 2 < len(prompt) < 80 for prompt in prompts)
    english = [prompt for prompt in prompts if prompt.isascii()]
    readme = (REPO / "ptuning" / "evaluation" / "questions" / "README.md").read_text(encoding="utf-8")
    counts = ", ".join(f"{kind} {kinds[kind]}" for kind in KINDS)
    assert counts in readme and f"{72 - len(english)} in\nChinese, {len(english)} in English" in readme
    assert questions[3].source.endswith("questions/probe.jsonl:4")


def test_no_question_is_in_the_training_data():
    training = "".join(
        (REPO / "data" / name / "train.json").read_text(encoding="utf-8") for name in ("advertise", "dialogue")
    )
    own = [question.prompt for question in read_probe() if f'"{question.prompt}"' in training]
    assert not own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "poem", "prompt": "写诗"}', ":1: kind: is text 'poem': use one of 'knowledge', 'arithmetic'"),
        ('{"kind": "chat", "prompt": " "}', ":1: prompt: is text ' ': write a question"),
        ('{"kind": "chat", "prompt": "好"}\n[1]', ":2: row: is a list of 1, not an object"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "probe.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_probe(path)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.fixture(scope="module")
def base_model():
    return load_model(REPO / "models" / "chatglm2-tiny")


@pytest.fixture(scope="module")
def encoder(base_model):
    model, tokenizer = base_model
    return Encoder(family_of(model.config).template(tokenizer), Lengths(64, 32))


def test_an_answer_that_was_cut_has_no_end_token(encoder):
    answers = ["白色。", "白色的衣", ""]
    rows = probe_rows(prober(None, encoder, [], QUESTIONS[:3]), answers, [True, False, True])
    eos = encoder.template.end_id
    labels = [[label for label in row.labels if label != IGNORE] for row in rows]
    texts = encoder.template.encode_text(answers)
    assert labels == [[*texts[0], eos], texts[1], [eos]]
    assert all(len(row.labels) == len(row.input_ids) for row in rows)
    assert rows[0].source == "probe.jsonl:1"
    (empty,) = probe_rows(prober(None, encoder, [], QUESTIONS[:1]), [""], [False])
    assert set(empty.labels) == {IGNORE}


def test_records():
    records = probe_records(QUESTIONS)
    assert [(record.prompt, record.response, record.history) for record in records][1] == ("问题1？", None, ())
    assert [record.response for record in probe_records(QUESTIONS, list("甲乙丙丁"))] == list("甲乙丙丁")


def lines():
    base = [
        {
            "index": i,
            "kind": question.kind,
            "prompt": question.prompt,
            "base": text,
            "finished": True,
            "base_loss": loss,
        }
        for i, (question, text, loss) in enumerate(
            zip(QUESTIONS, ["甲", "乙", "", "丁"], [0.5, 1, None, 0.1], strict=True)
        )
    ]
    return side_by_side(base, ["甲", "巳", "午", "丁"], [(6.0, 4), (6.0, 3), (0.0, 0), (1.0, 10)])


def test_answers_side_by_side():
    assert lines()[1] == {
        "index": 1,
        "kind": "arithmetic",
        "prompt": "问题1？",
        "base": "乙",
        "tuned": "巳",
        "base_loss": 1.0,
        "tuned_loss": 2.0,
        "tokens": 3,
    }
    assert (lines()[2]["base_loss"], lines()[2]["tuned_loss"]) == (None, None)


def test_summary():
    summary = probe_summary(lines())
    kinds, (low, high) = summary.pop("kinds"), summary.pop("interval")
    # Means over the three questions with a loss: (0.5 + 1 + 0.1) / 3 and (1.5 + 2 + 0.1) / 3.
    assert summary == {"rows": 4, "same": 50.0, "base_loss": 0.5333, "tuned_loss": 1.2, "change": 0.6667}
    assert 0 <= low < 0.6667 < high <= 1
    assert list(kinds) == list(KINDS)
    assert kinds["chat"] == {
        "rows": 1,
        "same": 100.0,
        "base_loss": 0.1,
        "tuned_loss": 0.1,
        "change": 0.0,
        "interval": [0.0, 0.0],
    }
    assert kinds["rewriting"] == {
        "rows": 1,
        "same": 0.0,
        "base_loss": None,
        "tuned_loss": None,
        "change": None,
        "interval": None,
    }
    json.dumps(summary, allow_nan=False)
    with pytest.raises(DataError, match=r"^0 probe questions were answered"):
        probe_summary([])


def prober(model, encoder, answers, questions=QUESTIONS):
    return Prober(
        questions,
        encoder,
        encoder.template.end_id,
        answer=lambda records: answers[: len(records)],
        losses=lambda rows: answer_losses(model, rows, encoder.template.pad_id, 256),
    )


@pytest.fixture
def model(base_model):
    """With a fresh prefix, which stands for a tuned one."""
    model = base_model[0].eval()
    attach_prefix(model, 8)
    yield model
    detach_prefix(model)


def test_before_and_after(model, encoder, tmp_path):
    said = [("白色。", True), ("白色的", False), ("", True), ("简约", True)]
    prefix = detach_prefix(model)
    base = probe_base(prober(model, encoder, said))
    assert [line["base_tokens"] for line in base] == [
        len(encoder.template.encode_text([text])[0]) + ended for text, ended in said
    ]
    assert base[1] == {
        "index": 1,
        "kind": "arithmetic",
        "prompt": "问题1？",
        "base": "白色的",
        "finished": False,
        "base_loss": base[1]["base_loss"],
        "base_tokens": base[1]["base_tokens"],
    }
    _, summary = probe_tuned(prober(model, encoder, said), base)
    assert summary["same"] == 100 and summary["change"] == pytest.approx(0, abs=1e-4)

    attach_encoder(model, prefix)
    tuned, summary = probe_tuned(prober(model, encoder, [("红色。", True), *said[1:]]), base)
    assert summary["same"] == 75 and abs(summary["change"]) > 1e-3
    assert [line["base"] for line in tuned] == [text for text, _ in said]
    assert [line["base_loss"] for line in tuned] == pytest.approx([line["base_loss"] for line in base], abs=1e-6)
    (row,) = probe_rows(prober(model, encoder, [], QUESTIONS[:1]), ["白色。"], [True])
    with torch.no_grad():
        expected = model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
    assert tuned[0]["tuned_loss"] == pytest.approx(float(expected), abs=6e-5)  # written in 4 places
    assert all(math.isfinite(line["tuned_loss"]) for line in tuned)


def test_the_bases_half_is_read_back(model, encoder, tmp_path):
    assert read_probe_base(tmp_path, QUESTIONS) is None
    base = probe_base(prober(model, encoder, [("白色。", True)] * 4))
    path = tmp_path / PROBE_BASE
    write_lines(path, base)
    assert read_probe_base(tmp_path, QUESTIONS) == base

    with pytest.raises(DataError) as caught:
        read_probe_base(tmp_path, QUESTIONS[:3])
    assert str(caught.value) == (
        f"{path}: answers 4 questions, the probe has 3: delete the file to answer them again with the base"
    )
    path.write_text('{"prompt": "问题0？", "base": "白"}', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_probe_base(tmp_path, QUESTIONS)
    assert str(caught.value) == f"{path}:1: finished: is missing: delete the file to answer them again with the base"
    write_lines(path, base)
    other = [*QUESTIONS[:3], ProbeQuestion("chat", "新的？", "probe.jsonl:4")]
    with pytest.raises(DataError) as caught:
        read_probe_base(tmp_path, other)
    assert str(caught.value) == (
        f"{path}:4: prompt: '问题3？' is not the question in probe.jsonl:4, '新的？': "
        "delete the file to answer them again with the base"
    )
