"""Token ids of texts and of training rows equal the official scripts'. Needs the real tokenizer."""

import json

from ptuning.data.encode import Encoder, Lengths
from ptuning.data.formats import Record
from ptuning.families.chatglm2.template import ChatGLM2Template, build_prompt


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tokenizer(golden_dir, real_tokenizer):
    rows = read_lines(golden_dir / "tokenizer.jsonl")
    assert len(rows) > 10
    for row in rows:
        assert real_tokenizer(row["text"], add_special_tokens=False).input_ids == row["ids"]
        assert real_tokenizer(row["text"]).input_ids == row["ids_with_special"]
        assert real_tokenizer.encode_text(row["text"]) == row["ids"]
        for ids in (row["ids"], row["ids_with_special"]):
            assert real_tokenizer.decode(ids) == row["decoded"]
            assert real_tokenizer.decode(ids, skip_special_tokens=True) == row["decoded"]
    assert real_tokenizer.encode_text([row["text"] for row in rows]) == [row["ids"] for row in rows]


def test_preprocess(golden_dir, real_tokenizer):
    rows = read_lines(golden_dir / "preprocess.jsonl")
    records = [
        Record(row["prompt"], row["response"], tuple(map(tuple, row["history"])), f"preprocess.jsonl:{i}")
        for i, row in enumerate(rows, start=1)
    ]
    assert any(record.history for record in records)
    encoded, report = Encoder(ChatGLM2Template(real_tokenizer), Lengths(4096, 4096)).training_rows(records)
    for row, record, (ids, labels) in zip(rows, records, ((r.input_ids, r.labels) for r in encoded), strict=True):
        assert build_prompt(record.prompt, record.history) == row["prompt_text"]
        assert ids == row["input_ids"]
        assert labels == row["labels"]
    assert (report.rows, report.longest) == (len(rows), max(len(row["input_ids"]) for row in rows))
    assert report.dropped_turns == report.cut_questions == report.cut_answers == 0
