"""Files that can't be read as rows at all: each is refused by what is wrong with it and how to put it right."""

import gzip
import hashlib
from pathlib import Path

import pytest

from ptuning.data.files import data_fingerprint
from ptuning.data.formats import Columns
from ptuning.data.records import read_records
from ptuning.data.rows import fingerprint, iterate_rows, size
from ptuning.errors import DataError

COLUMNS = Columns("prompt", "response")
ROW = '{"prompt": "衣服的颜色是什么", "response": "白色的"}'


def refusal(path: Path) -> str:
    # Skipping invalid rows must not help: what follows such a fault can't be told apart.
    with pytest.raises(DataError) as caught:
        read_records(path, COLUMNS, skip_invalid=True)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def refused_bytes(folder: Path, content: bytes, name: str = "train.json") -> str:
    path = folder / name
    path.write_bytes(content)
    return refusal(path).removeprefix(str(path))


def test_a_missing_file_proposes_similar_names(tmp_path):
    (tmp_path / "train.json").write_text(ROW, encoding="utf-8")
    (tmp_path / "other.txt").write_text("", encoding="utf-8")
    message = refusal(tmp_path / "trian.json")
    assert message == f"{tmp_path}/trian.json: no such file in {tmp_path.resolve()}: did you mean 'train.json'?"


def test_a_missing_file_with_no_similar_name(tmp_path):
    assert refusal(tmp_path / "train.json").endswith(f"no such file in {tmp_path.resolve()}: correct the path")


def test_a_missing_folder(tmp_path):
    path = tmp_path / "nowhere" / "train.json"
    assert refusal(path) == f"{path}: no such file, nor a folder {path.parent} in {Path.cwd()}: correct the path"


def test_a_directory_names_its_data_files(tmp_path):
    (tmp_path / "dev.json").write_text(ROW, encoding="utf-8")
    (tmp_path / "readme.md").write_text("", encoding="utf-8")
    assert refusal(tmp_path).endswith(": this is a directory, not a data file: name one of its files: 'dev.json'")
    (tmp_path / "dev.json").unlink()
    assert refusal(tmp_path).endswith(
        "not a data file: it has none to name (read are .json, .jsonl, .csv, .tsv (also with .gz), .xlsx, .parquet, .arrow)"
    )


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name(name):
    with pytest.raises(DataError) as caught:
        read_records(name, COLUMNS)
    assert str(caught.value) == f"{name!r}: the name of a data file is empty: give a file, or leave it out"


def test_a_path_the_system_refuses(tmp_path):
    path = tmp_path / ("a" * 300)
    assert refusal(path) == f"{path}: can't be read (File name too long): check the path and the permissions"


@pytest.mark.parametrize(("content", "size"), [(b"", 0), (b" \r\n\t", 4), (b"\xef\xbb\xbf", 3)])
def test_an_empty_file(tmp_path, content, size):
    expected = f": the file is empty ({size} bytes): write at least 1 row into it"
    assert refused_bytes(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            gzip.compress(ROW.encode(), mtime=0),
            ": this is a gzip archive, not JSON, JSON lines or CSV: let its name end in .gz (train.json.gz), or unpack it",
        ),
        (b"PK\x03\x04\x14\0", ": this is a zip archive or an Excel workbook, not JSON, JSON lines or CSV: unpack it"),
        (b"PAR1\x15\x04", ": this is a Parquet file, not JSON, JSON lines or CSV: let its name end in .parquet"),
    ],
)
def test_files_that_are_not_text(tmp_path, content, problem):
    assert refused_bytes(tmp_path, content).startswith(problem)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("gbk", "GBK"),
        ("gb18030", "GB18030"),
        ("big5", "BIG5"),
    ],
)
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, codec, name):
    text = {"big5": ROW.translate(str.maketrans("颜么", "顏麼")), "gb18030": ROW + "𠮷€ẑ"}.get(codec, ROW)
    message = refused_bytes(tmp_path, text.encode(codec), name="my train.json")
    source, target = tmp_path / "my train.json", tmp_path / "my train.utf8.json"
    assert message.startswith(f": the encoding is {name} (")
    assert message.endswith(f"only UTF-8 is read: convert it with `iconv -f {name} -t UTF-8 '{source}' > '{target}'`")


@pytest.mark.parametrize(
    ("content", "place", "first"),
    [
        (ROW.encode() + b"\n" + ROW.encode().replace("的".encode(), b"\xe7\x9a", 1), "1 place", "2: {} column 15"),
        # GBK could be read out of this one too.
        ('{"prompt": "白色", "response": "'.encode() + b'\xe7\x9a"}', "1 place", "1: {} column 31"),
        (b'{"prompt": "caf\xe9s", "response": "b"}', "1 place", "1: {} column 16"),
        (ROW.encode() + b"\xff" + ROW.encode() + b"\xff", "2 places", "1: {} column 42"),
    ],
)
def test_damaged_bytes_are_placed_and_not_taken_for_an_encoding(tmp_path, content, place, first):
    start = f":{first}".format(f"the text is not UTF-8 in {place}, the first at")
    message = refused_bytes(tmp_path, content)
    assert message == f"{start}: correct it there, or save the file again as UTF-8"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[\n{"a": "b",},\n{"a": "c"}]', ":2: JSON: "),
        ('[{"a": "b"},\n]', ": delete the comma before the closing bracket"),
        (
            '[{"a": "b"},\n{"a": "c" "d": "e"}]',
            ':2: JSON: Expecting \',\' delimiter at column 11, near \'{"a": "c" "d"',
        ),
        ('[{"a": "b"}\n{"a": "c"}]', ":2: JSON: Expecting ',' delimiter at column 1, near '{\"a\": \"c\"}]': correct"),
        ('[{"a": "b"},\n{"a": "c"}', "close the open bracket, or complete a file that was cut off"),
        ('[{"a": "b"},\n{"a": "c', ':2: JSON: Unterminated string starting at column 7, near \'{"a": "c\': close the'),
        ('[{"a": "b\nc"}]', ':1: JSON: Invalid control character at column 10, near \'[{"a": "b\': write a line break'),
        (r'[{"a": "C:\data"}]', ": write a backslash inside a text as \\\\"),
        ("[{'a': 'b'}]", ": use double quotes instead of single ones"),
        ("[{“a”: 1}]", ": replace the full-width “ by its ASCII counterpart"),
        ('[{"a"：1}]', ": replace the full-width ： by its ASCII counterpart"),
        (
            '[{"a": "b"}]\n\n[{"a": "c"}]',
            ':3: JSON: Extra data after the array\'s ] at column 1, near \'[{"a": "c"}]\': put',
        ),
        ("[" * 100_000, ":1: JSON: the brackets are nested too deeply to be read: a row is one flat object"),
    ],
)
def test_broken_json_arrays(tmp_path, text, problem):
    assert problem in refused_bytes(tmp_path, text.encode())


def test_a_trailing_comma_in_an_object_of_an_array(tmp_path):
    message = refused_bytes(tmp_path, b'[\n{"a": "b",},\n{"a": "c"}]')
    assert message.endswith(": delete the comma before the closing bracket")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "rows spread over several lines must stand in one array: [row, row, …]"),
        ('{"a": 1} {"a": 2}', 'JSON: Extra data at column 10, near \'{"a": 1} {"a": 2}\': put one object on each line'),
        (
            "prompt,response",
            "near 'prompt,response': start the row with {, or give a CSV file a name that ends in .csv",
        ),
        ("\ufeff" + ROW, "delete the invisible byte order mark there, left from joining files"),
        ('{"a":' * 100_000, "JSON: the brackets are nested too deeply to be read"),
        ("{'a': 1}", "use double quotes instead of single ones"),
    ],
)
def test_broken_json_lines_are_faults_of_their_row(tmp_path, line, problem):
    path = tmp_path / "train.json"
    path.write_text(f"{ROW}\n\n{line}\n{ROW}\n", encoding="utf-8")
    records, problems = read_records(path, COLUMNS, skip_invalid=True)
    assert [record.source for record in records] == [f"{path}:1", f"{path}:4"]
    assert len(problems) == 1
    assert str(problems[0]).startswith(f"{path}:3: JSON: ")
    assert problem in str(problems[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            'prompt,response\na,b\nc,"d\ne,f\n',
            ":3: CSV: unexpected end of data in the record that starts on this line: ",
        ),
        ('prompt,response\n"a"b,c\n', ":2: CSV: ',' expected after '\"' in the record"),
        ("prompt,response,prompt\na,b,c\n", ":1: CSV: the header names 'prompt' more than once: give each column its"),
        (f"prompt,response\na,{'b' * 200_000}\n", "(131072) in the record that starts on this line: close each quoted"),
    ],
)
def test_broken_csv(tmp_path, text, problem):
    assert problem in refused_bytes(tmp_path, text.encode(), name="train.csv")


@pytest.mark.parametrize(("row", "cells"), [("a", 1), ("a,b,c", 3)])
def test_csv_rows_of_the_wrong_width_are_faults_of_their_row(tmp_path, row, cells):
    path = tmp_path / "train.csv"
    path.write_text(f'prompt,response\n"x\ny",z\n{row}\n', encoding="utf-8")
    records, problems = read_records(path, COLUMNS, skip_invalid=True)
    assert len(records) == 1
    expected = f"row: has {cells} cells, the header has 2 ('prompt', 'response'): put a cell with commas into double"
    assert [str(problem) for problem in problems] == [f'{path}:4: {expected} quotes: "a, b"']


def test_the_fingerprint_is_the_sha256_of_the_bytes(tmp_path):
    path = tmp_path / "a.json"
    content = b"\xef\xbb\xbf" + ROW.encode() * 40_000  # more than one piece of 1 MiB
    path.write_bytes(content)
    assert data_fingerprint(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"")
    assert data_fingerprint(str(path)) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", ["https://host/train.json", "hf://datasets/a/b/train.parquet", "s3://bucket/a.csv"])
def test_a_url_is_not_read(name):
    for read in (fingerprint, lambda name: read_records(name, COLUMNS)):
        with pytest.raises(DataError) as caught:
            read(name)
        assert str(caught.value) == (
            f"{name}: a URL isn't read: download the file first and give its path (read are .json, .jsonl, .csv, .tsv (also "
            "with .gz), .xlsx, .parquet, .arrow)"
        )


def test_an_unknown_ending_is_read_where_it_holds_json(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(ROW, encoding="utf-8")
    assert read_records(path, COLUMNS)[0][0].response == "白色的"
    path.write_text("衣服\t白色", encoding="utf-8")
    assert refusal(path) == (
        f"{path}: the ending of the name says no format, and the text is no JSON: read are .json, .jsonl, .csv, .tsv (also "
        "with .gz), .xlsx, .parquet, .arrow"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json.gz", f"[{ROW}]"),
        ("a.JSONL.GZ", ROW),
        ("a.csv.gz", "prompt,response\n衣服的颜色是什么,白色的\n"),
        ("a.tsv.gz", "prompt\tresponse\n衣服的颜色是什么\t白色的\n"),
    ],
)
def test_gzip_is_read_as_what_is_in_it(tmp_path, name, text):
    path, bytes_read = tmp_path / name, []
    path.write_bytes(gzip.compress(text.encode("utf-8-sig")))
    (record,), problems = read_records(path, COLUMNS)
    assert (record.prompt, record.response, problems) == ("衣服的颜色是什么", "白色的", [])
    assert record.source.startswith(f"{path}:")
    assert list(iterate_rows(path, progress=bytes_read.append))
    assert bytes_read[-1] == size(path) == path.stat().st_size
    assert fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_faults_in_gzip(tmp_path):
    packed = gzip.compress((ROW + "\n").encode() * 10_000, mtime=0)
    end = ": the gzip archive is damaged or cut off (Compressed file ended before the end-of-stream marker was reached): make or"
    assert refused_bytes(tmp_path, packed[:-20], "a.jsonl.gz").startswith(end)
    bad = refused_bytes(tmp_path, ROW.encode(), "a.jsonl.gz")
    assert bad.startswith(": the gzip archive is damaged or cut off (Not a gzipped file (b'{\"')): make")
    message = refused_bytes(tmp_path, gzip.compress(ROW.encode("gbk")), "a.json.gz")
    assert message.endswith(f"`gunzip -c {tmp_path}/a.json.gz | iconv -f GBK -t UTF-8 > {tmp_path}/a.utf8.json`")
    assert refused_bytes(tmp_path, gzip.compress(b"[1,\n"), "a.json.gz").startswith(":2: JSON: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;response\na, b, c;d\n"),
        ("a.csv", '\n"prompt";response\n"a, b, c";d\n'),
        ("a.csv", "prompt\tresponse\na, b, c\td\n"),
        ("a.tsv", "prompt\tresponse\na, b, c\td\n"),
        ("a.csv", 'prompt,response\n"a, b, c",d\n'),
        ("a.csv", '"prompt",response,"x;y;z;"\n"a, b, c",d,\n'),
    ],
)
def test_the_header_says_what_separates_cells(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    (record,), _ = read_records(path, COLUMNS)
    assert (record.prompt, record.response) == ("a, b, c", "d")


def test_a_tsv_has_tabs_alone_and_says_so(tmp_path):
    message = refused_bytes(tmp_path, b"prompt\tresponse;x;y\na\tb\n", "a.tsv")
    assert "no row has this column, the columns are 'prompt', 'response;x;y'" in message
    message = refused_bytes(tmp_path, b"prompt\tresponse\na\tb\tc\n", "a.tsv")
    assert 'put a cell with tabs into double quotes: "a\t b"' in message
    message = refused_bytes(tmp_path, b"prompt;response\na;b;c\n", "a.csv")
    assert 'put a cell with semicolons into double quotes: "a; b"' in message


def test_the_fingerprint_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file in"):
        data_fingerprint(tmp_path / "a.json")
