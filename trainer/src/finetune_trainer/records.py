"""Reads the records of dataset files one by one, each with the place it came from.

JSON Lines, JSON (one array of objects), CSV with a header line, Parquet. prepare reads the files of the dataset
artifact in the order of their names. What a record must contain is for formats.py; a line that is no record at all is
reported here as a Broken, so that one policy (prepare's) decides about both.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import UserError

MAX_RECORD_BYTES = 64 << 20
"""Of one line or one field. Nothing that fits a training row comes near it, and no file can make a stage hold more."""

_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 1024
_SPACE = " \t\r\n"
_SHOWN = 120
"""Characters of an object's names that a message shows."""


@dataclass(frozen=True)
class Record:
    """A parsed record; `line` is the line it begins on, counted from 1 (Parquet: the row)."""

    file: str
    line: int
    value: Any


@dataclass(frozen=True)
class Broken:
    """A place of a file where a record should be and none can be read; `found` says what is there."""

    file: str
    line: int
    found: str


def read_records(path: Path, name: str) -> Iterator[Record | Broken]:
    """Every record of the file at `path`, which messages call `name`. Blank lines are no records.

    UserError (DatasetNotReadable) when the file as a whole is not of its type.
    """
    if path.suffix == ".jsonl":
        yield from _read_json_lines(path, name)
    elif path.suffix == ".json":
        yield from _read_json(path, name)
    elif path.suffix == ".csv":
        yield from _read_csv(path, name)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, name)
    else:
        raise UserError("DatasetNotReadable", f"{name}: files of type {path.suffix!r} cannot be read")


def _read_json_lines(path: Path, name: str) -> Iterator[Record | Broken]:
    with path.open("rb") as file:
        for line, data in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""), start=1):
            if len(data) > MAX_RECORD_BYTES:
                while data and not data.endswith(b"\n"):
                    data = file.readline(MAX_RECORD_BYTES)
                yield Broken(name, line, f"a line of more than {MAX_RECORD_BYTES} bytes")
                continue
            if line == 1:
                data = data.removeprefix(_BOM)
            if not data.strip():
                continue
            try:
                yield Record(name, line, json.loads(data.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Broken(name, line, f"no UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                yield Broken(name, line, f"no JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                # a number of thousands of digits, or thousands of brackets
                yield Broken(name, line, f"JSON that cannot be read: {error}")


def _read_json(path: Path, name: str) -> Iterator[Record | Broken]:
    text = _decode(path, name)
    start = len(text) - len(text.lstrip(_SPACE))
    if not text[start:].startswith("["):
        # The ending .json on a file of lines is common.
        _check_not_one_object(text, name)
        yield from _read_json_lines(path, name)
        return
    decoder = json.JSONDecoder()
    position, line, counted = start + 1, 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # After a syntax error inside an array nobody can say where the next record begins.
            raise UserError(
                "DatasetNotReadable", f"{name}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError("DatasetNotReadable", f"{name}, line {line}: JSON that cannot be read: {error}") from error
        yield Record(name, line, value)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            where = 1 + text.count("\n", 0, position)
            raise UserError("DatasetNotReadable", f"{name}, line {where}: expected ',' or ']' after a record")
    if text[position + 1 :].strip(_SPACE):
        raise UserError("DatasetNotReadable", f"{name}: there is more text after the array's end in line {line}")


def _check_not_one_object(text: str, name: str) -> None:
    """UserError where the file is one object over several lines, so that no line of it is a record."""
    first, _, rest = text.strip(_SPACE).partition("\n")
    if not rest:
        return
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        try:
            fields = ", ".join(map(str, json.loads(text)))
        except (ValueError, RecursionError, TypeError):
            return
        raise UserError(
            "DatasetNotReadable",
            f"{name} is one object (with {fields[:_SHOWN]}), expected an array of records or one record a line",
        ) from None


def _read_csv(path: Path, name: str) -> Iterator[Record | Broken]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(rows, None)
            if header is None:
                raise UserError(
                    "DatasetNotReadable", f"{name} is empty: a CSV file begins with the names of its fields"
                )
            twice = [field for place, field in enumerate(header) if not field.strip() or field in header[:place]]
            if twice:
                raise UserError(
                    "DatasetNotReadable",
                    f"{name}: the first line of a CSV file has to name its fields, each once, and it has {twice[0]!r} "
                    f"{'twice' if twice[0].strip() else 'without a name'}: put such a line in front",
                )
            line = rows.line_num + 1
            for row in rows:
                if len(row) == len(header):
                    yield Record(name, line, dict(zip(header, row, strict=True)))
                elif row:
                    yield Broken(name, line, f"{len(row)} fields, the header has {len(header)}")
                line = rows.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError("DatasetNotReadable", f"{name}, line {line}: no CSV in UTF-8: {error}") from error


def _read_parquet(path: Path, name: str) -> Iterator[Record | Broken]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(name, row, value)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        # pyarrow tells of broken pages by OSErrors without a number; those with one are the volume's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError("DatasetNotReadable", f"{name} is no whole Parquet file: {error}") from error


def _decode(path: Path, name: str) -> str:
    data = path.read_bytes().removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise UserError("DatasetNotReadable", f"{name}, line {line}: no UTF-8") from error


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
