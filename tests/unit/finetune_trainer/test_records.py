"""Reading dataset files: every record with its line, every broken line said."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow
import pytest
from chat_templates import CHATML, chat_tokenizer
from pyarrow import parquet

from finetune_trainer import records
from finetune_trainer.errors import UserError
from finetune_trainer.formats import open_format
from finetune_trainer.records import Broken, Record, read_records

A, B = {"x": "é"}, {"x": "2"}


def broken_page() -> bytes:
    """A Parquet file whose footer is whole and whose first page header is not."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"x": ["2"]}), file)
    return b"PAR1" + b"\xff" * 8 + file.getvalue()[12:]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        pytest.param("a.jsonl", '{"x":"é"}\n\n{"x":"2"}', [(1, A), (3, B)], id="lines, a blank one between"),
        pytest.param("a.jsonl", '\ufeff{"x":"2"}\r\n', [(1, B)], id="lines with a byte order mark"),
        pytest.param("a.jsonl", '{"x":"2"}\n{"x":\n[1]\n', [(1, B), (2, "no JSON"), (3, [1])], id="a broken line"),
        pytest.param(
            "a.jsonl", b'\xff\n{"x":"2"}\n', [(1, "no UTF-8 at byte 1"), (2, B)], id="a line that is no UTF-8"
        ),
        pytest.param("a.jsonl", "", [], id="an empty file"),
        pytest.param("a.json", '[\n {"x":"é"},\n\n {"x":\n"2"}\n]\n', [(2, A), (4, B)], id="an array over lines"),
        pytest.param("a.json", '[{"x":"é"},{"x":"2"}]', [(1, A), (1, B)], id="an array on one line"),
        pytest.param("a.json", "[]", [], id="an empty array"),
        pytest.param("a.json", '{"x":"é"}\n{"x":"2"}\n', [(1, A), (2, B)], id="lines in a .json file"),
        pytest.param(
            "a.jsonl",
            '{"x":"é"}\n{"x":' + "1" * 5000 + "}\n" + "[" * 100_000 + '\n{"x":"2"}\n',
            [(1, A), (2, "cannot be read: Exceeds the limit"), (3, "cannot be read: maximum recursion"), (4, B)],
            id="a number of 5000 digits, 100000 brackets",
        ),
        pytest.param("a.csv", 'x\né\n"2"\n', [(2, A), (3, B)], id="comma separated"),
        pytest.param(
            "a.csv",
            'x,y\n"a\nb",c\nd\ne,f\n',
            [(2, {"x": "a\nb", "y": "c"}), (4, "1 fields, the header has 2"), (5, {"x": "e", "y": "f"})],
            id="a field over two lines, a short line",
        ),
    ],
)
def test_text_files(tmp_path: Path, name: str, contents: str | bytes, expected: list[tuple[int, object]]) -> None:
    path = tmp_path / name
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    found = list(read_records(path, name))
    assert [(item.line, item.value if isinstance(item, Record) else "") for item in found] == [
        (line, "" if isinstance(value, str) else value) for line, value in expected
    ]
    for item, (_, value) in zip(found, expected, strict=True):
        if isinstance(item, Broken):
            assert isinstance(value, str)
            assert value in item.found


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"x": ["é", "2"]}), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet", "a.parquet")) == [
        Record("a.parquet", 1, A),
        Record("a.parquet", 2, B),
    ]


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]


def test_conversations_come_out_of_every_type_of_file_alike(tiny_tokenizer: Path, tmp_path: Path) -> None:
    """Lists of objects: nested columns of Parquet, in which rows have fields of other rows as null, and JSON in CSV."""
    other = [{"role": "user", "content": "Why?", "name": "Amy"}, {"role": "assistant", "content": "So."}]
    parquet.write_table(pyarrow.table({"messages": [CHAT, other]}), tmp_path / "a.parquet")
    for name, text in {
        "a.jsonl": "\n".join(json.dumps({"messages": chat}) for chat in (CHAT, other)),
        "a.json": json.dumps([{"messages": chat} for chat in (CHAT, other)], indent=1),
    }.items():
        (tmp_path / name).write_text(text)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(chat)] for chat in (CHAT, other))])
    record_format = open_format("messages", tokenizer=chat_tokenizer(tiny_tokenizer, CHATML))
    found = {}
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        records = list(read_records(tmp_path / name, name))
        assert all(isinstance(record, Record) for record in records)
        found[name] = [record_format.example(record.value) for record in records if isinstance(record, Record)]
    assert found["a.jsonl"] == found["a.json"] == found["a.csv"] == found["a.parquet"]
    assert [example.spans[-1].text for example in found["a.csv"]] == ["I.<|im_end|>", "So.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        pytest.param("a.json", b'[\n{"x": 1},\n{"x" 2}]', "a.json, line 3, column 6: no JSON", id="a broken array"),
        pytest.param(
            "a.json",
            b'{\n "data": [\n  {"x": 1}\n ]\n}',
            "is one object (with data), expected an array",
            id="one object",
        ),
        pytest.param("a.json", b"[1 2]", "line 1: expected ',' or ']'", id="no comma"),
        pytest.param("a.json", b"[1]\nx", "more text after the array's end", id="text after the array"),
        pytest.param("a.json", b"[\n\xff]", "line 2: no UTF-8", id="an array that is no UTF-8"),
        pytest.param("a.json", b"[" * 100_000, "line 1: JSON that cannot be read", id="an array that is too deep"),
        pytest.param("a.csv", b"", "is empty", id="no header"),
        pytest.param("a.csv", b'x\n"a', "line 2: no CSV", id="an open quote"),
        pytest.param("a.csv", b"yes,yes\nno,no\n", "name its fields, each once, and it has 'yes' twice", id="values"),
        pytest.param("a.csv", b"x,\n1,2\n", "and it has '' without a name", id="a field without a name"),
        pytest.param("a.parquet", b"PAR1", "no whole Parquet file", id="a cut parquet file"),
        pytest.param("a.parquet", broken_page(), "no whole Parquet file", id="a parquet file with a broken page"),
        pytest.param("a.txt", b"x", "files of type '.txt' cannot be read", id="another type"),
    ],
)
def test_a_file_that_is_not_of_its_type_is_refused(tmp_path: Path, name: str, contents: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError) as caught:
        list(read_records(tmp_path / name, name))
    assert caught.value.reason == "DatasetNotReadable"
    assert words in caught.value.message


def test_a_huge_line_is_one_broken_record_and_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 16)
    (tmp_path / "a.jsonl").write_bytes(b'{"x":"' + b"a" * 100 + b'"}\n{"x":"2"}\n' + b"b" * 50)
    first, second, third = read_records(tmp_path / "a.jsonl", "a.jsonl")
    assert first == Broken("a.jsonl", 1, "a line of more than 16 bytes")
    assert second == Record("a.jsonl", 2, {"x": "2"})
    assert third == Broken("a.jsonl", 3, "a line of more than 16 bytes")
