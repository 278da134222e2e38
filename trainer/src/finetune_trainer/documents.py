"""From dataset files to tokenised documents: reads, formats, encodes and spools, and tells of what cannot be used.

prepare calls collect_documents once. While the tokenizer's threads encode some batches of examples, this one spools the
batch before and reads the next; memory holds those and a few numbers a document.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_trainer.artifacts import read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.examples import BROKEN, DOUBLE_BOS, TOO_LONG, UNLEARNT, Example, RecordError
from finetune_trainer.formats import RecordFormat
from finetune_trainer.label_audit import LabelAudit
from finetune_trainer.records import Broken, read_records
from finetune_trainer.rejections import Problem, Rejections
from finetune_trainer.spool import DocumentSpool
from finetune_trainer.tokenization import Document, Encoder

_BATCH = 1000
"""Examples encoded at once: enough for the tokenizer's threads, little memory."""
_AHEAD = 1
"""Batches that are encoded while another is spooled. More were no faster on two cores."""
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Collected:
    """What came of reading a dataset. `cut` counts messages that conversations lost behind their last answer."""

    records: int
    cut: int
    rejections: Rejections
    audit: LabelAudit


def collect_documents(
    dataset: Path,
    encoder: Encoder,
    spool: DocumentSpool,
    *,
    record_format: RecordFormat,
    max_length: int | None,
    learn_prompt: bool,
    seed: int,
    rejections: Rejections,
    most: int | None = None,
) -> Collected:
    """Fill `spool` with every usable record of the dataset artifact, in the order of files and lines.

    A document of more than `max_length` tokens (None: any number is right) is rejected, never cut. With `learn_prompt`
    labels cover the prompt too. A document's key in the spool is a hash of the seed and its text. Goes on after the
    batches that the spool has from an earlier attempt, and reads no more than the first `most` records. UserError when
    too many records are rejected or none is left.
    """
    audit = LabelAudit(encoder)
    records, cut = _take_over(spool, rejections, audit)
    listed = len(rejections.problems)
    said = time.monotonic()
    for batch, documents in _encoded(encoder, _batches(dataset, record_format, skip=records, most=most)):
        records += batch.records
        cut_before = cut
        for problem in batch.problems:
            rejections.add(problem)
        for place, example, document in zip(batch.places, batch.examples, documents, strict=True):
            if learn_prompt:
                document = replace(document, learnt=[(1, len(document.tokens))])
            kind, found = _problem_of(document, max_length)
            if found:
                rejections.add(replace(place, found=found, kind=kind))
                audit.refuse(kind)
                continue
            cut += example.cut
            key = _key(seed, example)
            spool.add(document.tokens, document.learnt, key)
            audit.add(place, key, example, document)
        problems = [vars(problem) for problem in rejections.problems[listed:]]
        listed += len(problems)
        note = {"records": batch.records, "cut": cut - cut_before, "problems": problems, "audit": audit.take_chunk()}
        spool.commit(note)
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"read {records} records, encoded {len(spool)}, rejected {len(rejections.problems)}", flush=True)
    rejections.check(records)
    if len(spool) == 0:
        raise UserError("NoDocuments", f"the dataset has no usable record ({records} read): nothing to train on")
    print(f"read {records} records: {len(spool)} documents, {len(rejections.problems)} rejected", flush=True)
    if rejections.problems:
        print("rejected: " + ", ".join(f"{kind} {count}" for kind, count in rejections.counts().items()), flush=True)
    if cut:
        print(f"{cut} messages behind the last answer of their conversation are left out", flush=True)
    return Collected(records, cut, rejections, audit)


def _take_over(spool: DocumentSpool, rejections: Rejections, audit: LabelAudit) -> tuple[int, int]:
    """Records that an earlier attempt has read, and messages it cut; problems and labels go to the other arguments."""
    notes: list[dict[str, Any]] = spool.notes
    for note in notes:
        audit.add_chunk(note["audit"])
        for problem in note["problems"]:
            rejections.add(Problem(**problem))
    records = sum(note["records"] for note in notes)
    if records:
        print(f"an earlier attempt has read {records} records: going on after its {len(spool)} documents", flush=True)
    return records, sum(note["cut"] for note in notes)


@dataclass
class _Batch:
    """Some records: the examples of those that have one, with their places, and the problems of the others.

    A place is a Problem without `found`.
    """

    records: int = 0
    places: list[Problem] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def _encoded(encoder: Encoder, batches: Iterable[_Batch]) -> Iterator[tuple[_Batch, list[Document]]]:
    """Each batch with its documents. Those after it are encoded meanwhile: tokenizers needs no interpreter lock."""
    with ThreadPoolExecutor(max_workers=_AHEAD) as pool:
        waiting: deque[tuple[_Batch, Future[list[Document]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encoder.encode_examples, batch.examples)))
            if len(waiting) > _AHEAD:
                done, documents = waiting.popleft()
                yield done, documents.result()
        for done, documents in waiting:
            yield done, documents.result()


def _batches(dataset: Path, record_format: RecordFormat, *, skip: int, most: int | None) -> Iterator[_Batch]:
    """The records from number `skip` on up to `most`, in batches."""
    batch = _Batch()
    files = read_manifest(dataset).files
    records = (record for entry in files for record in read_records(dataset / entry.path, entry.path))
    for record in islice(records, skip, most):
        batch.records += 1
        place = Problem(record.file, record.line, field="", found="")
        if isinstance(record, Broken):
            batch.problems.append(replace(place, found=record.found, kind=BROKEN))
        else:
            try:
                batch.examples.append(record_format.example(record.value))
                batch.places.append(place)
            except RecordError as error:
                batch.problems.append(replace(place, field=error.field, found=error.found, kind=error.kind))
        if batch.records == _BATCH:
            yield batch
            batch = _Batch()
    yield batch


def _problem_of(document: Document, max_length: int | None) -> tuple[str, str]:
    """(kind, what is wrong) of a document that cannot be used; two empty strings when it can."""
    if document.double_bos:
        return DOUBLE_BOS, (
            "the text begins with the beginning-of-sequence token that the tokenizer adds itself: remove it"
        )
    if max_length is not None and len(document.tokens) > max_length:
        return TOO_LONG, f"{len(document.tokens)} tokens, maxLength is {max_length}"
    if not document.supervised:
        return UNLEARNT, "no token of it would be learnt: its answer has none"
    return "", ""


def _key(seed: int, example: Example) -> int:
    text = "\0".join([str(seed), *(span.text for span in example.spans)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
