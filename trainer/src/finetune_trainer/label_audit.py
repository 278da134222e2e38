"""What the labels of a run teach, counted over every document and shown for some: the evidence in prepare's artifact.

documents.py adds each document, stages/prepare.py writes label-audit.jsonl and stops the run when the labels are wrong,
preview.py shows the same in colours. Nothing here decides a label.

label-audit.jsonl has one JSON object a line: first the counts, then sampled documents, each with file and line and with
its tokens in spans that are learnt or not. For every sample the whole text is encoded once more in one piece, and the
characters that its tokens stand for are held against the spans of the example:

    offsets  same   the tokens are the same, and those that are learnt are the learnt characters to the letter
             apart  a token of the whole text would straddle a boundary, so the spans on both sides have their own
             wrong  a token is a label and its characters are not learnt, or the other way round: a violation
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_trainer.contract import canonical_json
from finetune_trainer.errors import UserError
from finetune_trainer.examples import DOUBLE_BOS, Example
from finetune_trainer.rejections import Problem
from finetune_trainer.tokenization import Document, Encoder

AUDIT_FILE = "label-audit.jsonl"
MIN_STOP_PERCENT = 99
"""Share of documents that must teach the model to stop."""

SAME, APART, WRONG = "same", "apart", "wrong"

_BINS = 10
_SAMPLES = 20
_SPAN_TOKENS = 512
"""Tokens of a span that a sample shows at most."""
_MIX = 0x9E3779B97F4A7C15
"""Odd: spreads keys, so that samples are others than the documents held out, which have the smallest keys."""


@dataclass
class Counts:
    """Of all documents that can be used, and of those refused for a doubled beginning.

    `histogram` counts documents by the share of their tokens that is learnt: up to 10 %, up to 20 % and so on.
    """

    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    stops: int = 0
    double_bos: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * _BINS)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.supervised += other.supervised
        self.stops += other.stops
        self.double_bos += other.double_bos
        self.histogram = [one + more for one, more in zip(self.histogram, other.histogram, strict=True)]


class LabelAudit:
    """Counts documents and keeps samples of them, always the same for the same documents."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._counts = Counts()
        self._chunk = Counts()
        self._samples: list[tuple[int, int, dict[str, Any]]] = []
        """A heap: the least of those kept in front. (mixed key, number of the document, what is told of it)."""
        self._chosen: list[tuple[int, int, Problem, Example, Document]] = []
        """The same of the documents since the last chunk: what is to be told of them is made once they are taken."""

    def add(self, place: Problem, key: int, example: Example, document: Document) -> None:
        """Note one document; `place` has its file and line, `key` is its hash."""
        size, supervised = len(document.tokens), document.supervised
        chunk = self._chunk
        number = self._counts.documents + chunk.documents
        chunk.documents += 1
        chunk.tokens += size
        chunk.supervised += supervised
        chunk.stops += document.learns_to_stop
        chunk.histogram[max(0, -(-supervised * _BINS // size) - 1)] += 1
        mixed = (key ^ number) * _MIX % 2**64
        if len(self._samples) < _SAMPLES or mixed > self._samples[0][0]:
            _keep(self._chosen, (mixed, number, place, example, document))

    def refuse(self, kind: str) -> None:
        """Note a document that was refused."""
        self._chunk.double_bos += kind == DOUBLE_BOS

    def take_chunk(self) -> dict[str, Any]:
        """What came since the last call, as JSON for add_chunk of a later process."""
        samples = []
        for mixed, number, place, example, document in sorted(self._chosen, key=lambda chosen: -chosen[0]):
            if len(self._samples) < _SAMPLES or mixed > self._samples[0][0]:
                sample = self._describe(place, example, document)
                _keep(self._samples, (mixed, number, sample))
                samples.append([mixed, number, sample])
        chunk = {"counts": asdict(self._chunk), "samples": samples}
        self._counts.add(self._chunk)
        self._chunk, self._chosen = Counts(), []
        return chunk

    def add_chunk(self, chunk: Mapping[str, Any]) -> None:
        """Take over what take_chunk gave an earlier process."""
        self._counts.add(Counts(**chunk["counts"]))
        for mixed, number, sample in chunk["samples"]:
            _keep(self._samples, (mixed, number, sample))

    @property
    def counts(self) -> Counts:
        """Of all chunks taken."""
        return self._counts

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The sampled documents in the order of the dataset."""
        return [sample for _, _, sample in sorted(self._samples, key=lambda kept: kept[1])]

    def metrics(self) -> dict[str, Any]:
        """The counts as numbers for the report; shares are in percent."""
        counts = self._counts
        return {
            "supervisedPercent": _percent(counts.supervised, counts.tokens),
            "stopSupervisedPercent": _percent(counts.stops, counts.documents),
            "doubleBos": counts.double_bos,
            "supervisedHistogram": list(counts.histogram),
        }

    def violations(self) -> list[str]:
        """Why these labels must not be trained on; empty when they may be."""
        counts, found = self._counts, []
        if counts.supervised == 0:
            found.append(f"none of {counts.tokens} tokens is learnt: the loss would be zero from the first step on")
        if counts.stops * 100 < MIN_STOP_PERCENT * counts.documents:
            found.append(
                f"{counts.stops} of {counts.documents} documents teach the model to stop, at least "
                f"{MIN_STOP_PERCENT} % must: it would never end an answer"
            )
        for sample in self.samples:
            if sample["offsets"] == WRONG:
                found.append(f"{sample['file']}, line {sample['line']}: its labels are not the characters to be learnt")
        return found

    def check(self) -> None:
        """UserError (LabelAuditFailed) with every violation."""
        found = self.violations()
        if found:
            raise UserError("LabelAuditFailed", "; ".join(found) + ": look at the records and at spec.dataset.format")

    def as_lines(self) -> bytes:
        """label-audit.jsonl."""
        counts = self._counts
        summary = {"documents": counts.documents, "tokens": counts.tokens, "supervisedTokens": counts.supervised}
        lines: list[Mapping[str, Any]] = [{**summary, **self.metrics(), "violations": self.violations()}, *self.samples]
        return b"".join(canonical_json(line) + b"\n" for line in lines)

    def summary(self) -> str:
        """The counts in a sentence, for the log."""
        counts, metrics = self._counts, self.metrics()
        apart = sum(sample["offsets"] == APART for sample in self.samples)
        text = (
            f"label audit: {counts.supervised} of {counts.tokens} tokens are learnt "
            f"({metrics['supervisedPercent']:g} %), {metrics['stopSupervisedPercent']:g} % of the documents teach the "
            f"model to stop, {counts.double_bos} began twice; documents by learnt share, in tenths: {counts.histogram}"
        )
        if apart:
            text += (
                f"\n{apart} of {len(self._samples)} sampled documents were encoded apart at a boundary: a token would "
                "have joined the end of the prompt and the beginning of the answer, often for a space at the prompt's "
                "end"
            )
        return text

    def _describe(self, place: Problem, example: Example, document: Document) -> dict[str, Any]:
        spans = []
        for first, end, learnt in _runs(document.learnt, len(document.tokens)):
            tokens = document.tokens[first:end]
            spans.append(
                {
                    "learnt": learnt,
                    "tokens": tokens[:_SPAN_TOKENS],
                    "text": self._encoder.decode(tokens[:_SPAN_TOKENS]) + ("…" if len(tokens) > _SPAN_TOKENS else ""),
                }
            )
        return {
            "file": place.file,
            "line": place.line,
            "tokens": len(document.tokens),
            "supervisedTokens": document.supervised,
            "learnsToStop": document.learns_to_stop,
            "offsets": compare_offsets(self._encoder, example, document),
            "spans": spans,
        }


def compare_offsets(encoder: Encoder, example: Example, document: Document) -> str:
    """SAME, APART or WRONG: the document's labels against the character offsets of the whole text in one piece."""
    tokens, offsets = encoder.encode_whole(example.text)
    size = 0 if example.rendered else len(encoder.prefix)
    if document.tokens[size : size + len(tokens)] != tokens:
        return APART
    bounds, position = [], 0
    for span in example.spans:
        bounds.append((position, position + len(span.text), span.learnt))
        position += len(span.text)
    marks = _marks(document.learnt, len(document.tokens))
    learns_all = all(marks[1:])
    for number, (first, end) in enumerate(offsets, start=size):
        inside = [learnt for begin, stop, learnt in bounds if first < stop and end > begin]
        if len(inside) > 1:
            return APART
        if inside and number > 0 and marks[number] != (inside[0] or learns_all):
            return WRONG
    return SAME


def _keep(heap: list[Any], item: tuple[Any, ...]) -> None:
    """Put `item` on the heap of the greatest; the second of an item tells any two apart, so no third is compared."""
    if len(heap) < _SAMPLES:
        heapq.heappush(heap, item)
    elif item > heap[0]:
        heapq.heapreplace(heap, item)


def _marks(learnt: Sequence[tuple[int, int]], size: int) -> list[bool]:
    marks = [False] * size
    for first, end in learnt:
        marks[first:end] = [True] * (end - first)
    return marks


def _runs(learnt: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int, bool]]:
    """(first, end, learnt) of the whole document's tokens."""
    at = 0
    for first, end in learnt:
        if first > at:
            yield at, first, False
        yield first, end, True
        at = end
    if at < size:
        yield at, size, False


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3) if whole else 0.0
