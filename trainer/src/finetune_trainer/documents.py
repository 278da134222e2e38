"""From dataset files to tokenised documents: reads, formats, encodes and spools, and tells of what cannot be used.

prepare calls collect_documents once. Memory holds one batch of examples and a few numbers a document.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.formats import Example, RecordError, build_example
from finetune_trainer.records import Broken, read_records
from finetune_trainer.rejections import Problem, Rejections
from finetune_trainer.rows import DocumentSpool
from finetune_trainer.tokenization import Document, Encoder

_BATCH = 1000
"""Examples encoded at once: enough for the tokenizer's threads, little memory."""
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Collected:
    """What came of reading a dataset.

    `keys` is one 64-bit hash a document, of the seed and its text. `two_parts` counts the documents whose prompt and
    completion had to be encoded apart.
    """

    records: int
    keys: array[int]
    two_parts: int
    rejections: Rejections


def collect_documents(
    dataset: Path,
    encoder: Encoder,
    spool: DocumentSpool,
    *,
    format_name: str,
    max_length: int,
    learn_prompt: bool,
    seed: int,
    rejections: Rejections,
) -> Collected:
    """Fill `spool` with every usable record of the dataset artifact, in the order of files and lines.

    A document of more than `max_length` tokens is rejected, never cut. With `learn_prompt` labels cover the prompt too.
    UserError when too many records are rejected or none is left.
    """
    keys = array("Q")
    records = two_parts = 0
    said = time.monotonic()
    for batch in _batches(dataset, format_name, rejections):
        records += len(batch)
        usable = [(place, example) for place, example in batch if example is not None]
        documents = encoder.encode_examples([example for _, example in usable])
        for (place, example), document in zip(usable, documents, strict=True):
            found = _problem_of(document, max_length)
            if found:
                rejections.add(replace(place, found=found))
                continue
            two_parts += document.was_split
            spool.add(document.tokens, [(1 if learn_prompt else document.boundary, len(document.tokens))])
            keys.append(_key(seed, example))
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"read {records} records, encoded {len(spool)}, rejected {len(rejections.problems)}", flush=True)
    rejections.check(records)
    if len(spool) == 0:
        raise UserError("NoDocuments", f"the dataset has no usable record ({records} read): nothing to train on")
    print(f"read {records} records: {len(spool)} documents, {len(rejections.problems)} rejected", flush=True)
    if two_parts:
        print(
            f"{two_parts} documents were encoded in two parts: a token would have joined the end of the prompt and the "
            "beginning of the completion",
            flush=True,
        )
    return Collected(records, keys, two_parts, rejections)


def _batches(dataset: Path, format_name: str, rejections: Rejections) -> Iterator[list[tuple[Problem, Example | None]]]:
    """Every record's place with its example, or None where it was rejected. A place is a Problem without `found`."""
    batch: list[tuple[Problem, Example | None]] = []
    for entry in read_manifest(dataset).files:
        for record in read_records(dataset / entry.path, entry.path):
            place = Problem(record.file, record.line, field="", found="")
            example = None
            if isinstance(record, Broken):
                rejections.add(replace(place, found=record.found))
            else:
                try:
                    example = build_example(format_name, record.value)
                except RecordError as error:
                    rejections.add(replace(place, field=error.field, found=error.found))
            batch.append((place, example))
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


def _problem_of(document: Document, max_length: int) -> str:
    """Why a document cannot be used; "" when it can."""
    if document.double_bos:
        return "the prompt begins with the beginning-of-sequence token that the tokenizer adds itself: remove it"
    if len(document.tokens) > max_length:
        return f"{len(document.tokens)} tokens, maxLength is {max_length}"
    return ""


def _key(seed: int, example: Example) -> int:
    text = f"{seed}\0{example.prompt}\0{example.completion}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
