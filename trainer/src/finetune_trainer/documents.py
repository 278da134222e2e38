"""From dataset files to tokenised documents: reads, formats, encodes and spools, and tells of what cannot be used.

prepare calls collect_documents once. Memory holds one batch of examples and a few numbers a document.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.formats import Example, RecordError, build_example
from finetune_trainer.records import Broken, read_records
from finetune_trainer.rejections import Problem, Rejections
from finetune_trainer.spool import DocumentSpool
from finetune_trainer.tokenization import Document, Encoder

_BATCH = 1000
"""Examples encoded at once: enough for the tokenizer's threads, little memory."""
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Collected:
    """What came of reading a dataset.

    `two_parts` counts the documents whose prompt and completion had to be encoded apart.
    """

    records: int
    two_parts: int
    rejections: Rejections


def collect_documents(
    dataset: Path,
    encoder: Encoder,
    spool: DocumentSpool,
    *,
    format_name: str,
    max_length: int | None,
    learn_prompt: bool,
    seed: int,
    rejections: Rejections,
) -> Collected:
    """Fill `spool` with every usable record of the dataset artifact, in the order of files and lines.

    A document of more than `max_length` tokens (None: any number is right) is rejected, never cut. With `learn_prompt`
    labels cover the prompt too. A document's key in the spool is a hash of the seed and its text. Goes on after the
    batches that the spool has from an earlier attempt. UserError when too many records are rejected or none is left.
    """
    records, two_parts = _take_over(spool, rejections)
    listed = len(rejections.problems)
    said = time.monotonic()
    for batch in _batches(dataset, format_name, rejections, skip=records):
        records += len(batch)
        before = two_parts
        usable = [(place, example) for place, example in batch if example is not None]
        documents = encoder.encode_examples([example for _, example in usable])
        for (place, example), document in zip(usable, documents, strict=True):
            found = _problem_of(document, max_length)
            if found:
                rejections.add(replace(place, found=found))
                continue
            two_parts += document.was_split
            learnt = [(1 if learn_prompt else document.boundary, len(document.tokens))]
            spool.add(document.tokens, learnt, _key(seed, example))
        problems = [vars(problem) for problem in rejections.problems[listed:]]
        listed += len(problems)
        spool.commit({"records": len(batch), "twoParts": two_parts - before, "problems": problems})
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
    return Collected(records, two_parts, rejections)


def _take_over(spool: DocumentSpool, rejections: Rejections) -> tuple[int, int]:
    """Records that an earlier attempt has read, and its documents in two parts; its problems go to `rejections`."""
    notes: list[dict[str, Any]] = spool.notes
    for note in notes:
        for problem in note["problems"]:
            rejections.add(Problem(**problem))
    records = sum(note["records"] for note in notes)
    if records:
        print(f"an earlier attempt has read {records} records: going on after its {len(spool)} documents", flush=True)
    return records, sum(note["twoParts"] for note in notes)


def _batches(
    dataset: Path, format_name: str, rejections: Rejections, *, skip: int
) -> Iterator[list[tuple[Problem, Example | None]]]:
    """Each record's place with its example, or None where it was rejected, after the first `skip` records.

    A place is a Problem without `found`.
    """
    batch: list[tuple[Problem, Example | None]] = []
    files = read_manifest(dataset).files
    records = (record for entry in files for record in read_records(dataset / entry.path, entry.path))
    for record in islice(records, skip, None):
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


def _problem_of(document: Document, max_length: int | None) -> str:
    """Why a document cannot be used; "" when it can."""
    if document.double_bos:
        return "the prompt begins with the beginning-of-sequence token that the tokenizer adds itself: remove it"
    if max_length is not None and len(document.tokens) > max_length:
        return f"{len(document.tokens)} tokens, maxLength is {max_length}"
    return ""


def _key(seed: int, example: Example) -> int:
    text = f"{seed}\0{example.prompt}\0{example.completion}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
