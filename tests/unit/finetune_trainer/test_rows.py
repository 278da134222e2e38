"""The rows files: every token of every document once, in order, with the right label, position and segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from finetune_trainer import rows as rows_module
from finetune_trainer.artifacts import new_artifact, verify_artifact
from finetune_trainer.packing import PACKINGS, PackedRows, pack_documents
from finetune_trainer.rows import count_supervised, write_rows
from finetune_trainer.spool import IGNORED, DocumentSpool

LENGTH, PAD = 24, 3
KEYS = ("input_ids", "labels", "position_ids", "segment_ids")

Rows = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.int32]]"]


@st.composite
def documents(draw: st.DrawFn, longest: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of some documents: tokens are all distinct, labels any of them but the first."""
    found, first = [], 10
    for length in draw(st.lists(st.integers(1, longest), min_size=1, max_size=30)):
        tokens = list(range(first, first + length))
        learnt = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        labels = [
            token if place and is_learnt else IGNORED
            for place, (token, is_learnt) in enumerate(zip(tokens, learnt, strict=True))
        ]
        found.append((tokens, labels))
        first += length
    return found


def spooled(folder: Path, contents: list[tuple[list[int], list[int]]]) -> DocumentSpool:
    spool = DocumentSpool(folder)
    for tokens, labels in contents:
        places = [place for place, label in enumerate(labels) if label != IGNORED]
        spool.add(tokens, [(place, place + 1) for place in places])
    return spool


def written(folder: Path, spool: DocumentSpool, packed: PackedRows) -> Rows:
    with new_artifact(folder / "x", "prepare") as writer:
        write_rows(writer, "rows.safetensors", spool, packed, row_length=LENGTH, pad=PAD)
    verify_artifact(folder / "x")
    arrays = load_file(folder / "x" / "rows.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        name: (np.dtype("int32"), (len(packed), LENGTH)) for name in KEYS
    }
    return arrays


def pieces(arrays: Rows, row: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every piece of a row; its positions, segments and padding are looked at on the way."""
    ids, labels, positions, segments = (arrays[name][row] for name in KEYS)
    found, start = [], 0
    for segment in range(1, segments.max() + 1):
        places = np.flatnonzero(segments == segment)
        assert places.tolist() == list(range(start, start + len(places)))
        assert positions[places].tolist() == list(range(len(places)))
        found.append((ids[places].tolist(), labels[places].tolist()))
        start += len(places)
    assert (ids[start:] == PAD).all()
    assert (labels[start:] == IGNORED).all()
    assert not positions[start:].any()
    assert not segments[start:].any()
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packing=st.sampled_from(PACKINGS), at_once=st.sampled_from([1, 2 * LENGTH, 1 << 18]))
def test_rows_hold_every_token_once_in_order_and_with_its_label(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, packing: str, at_once: int
) -> None:
    contents = data.draw(documents(3 * LENGTH if packing == "wrapped" else LENGTH))
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch, spooled(folder, contents) as spool:
        patch.setattr(rows_module, "_POSITIONS_AT_ONCE", at_once)
        packed = pack_documents(packing, spool.lengths, LENGTH)
        arrays = written(folder, spool, packed)
        counts = count_supervised(spool, packed, LENGTH)
    rebuilt: dict[int, tuple[list[int], list[int]]] = {number: ([], []) for number in range(len(contents))}
    for row in range(len(packed)):
        for (number, begin, end), (tokens, labels) in zip(packed.row(row), pieces(arrays, row), strict=True):
            whole_labels = contents[number][1]
            assert begin == len(rebuilt[number][0])
            assert len(tokens) == end - begin
            assert labels[0] == IGNORED
            rebuilt[number][0].extend(tokens)
            # what a cut takes from the labels is the first one after it, and nothing else
            rebuilt[number][1].extend([whole_labels[begin], *labels[1:]])
    assert [rebuilt[number] for number in range(len(contents))] == contents
    assert counts.tolist() == (arrays["labels"] != IGNORED).sum(axis=1).tolist()
    learnt = sum(label != IGNORED for _, labels in contents for label in labels)
    lost = sum(contents[n][1][begin] != IGNORED for row in range(len(packed)) for n, begin, _ in packed.row(row))
    assert counts.sum() == learnt - lost
    assert packing == "wrapped" or lost == 0


def test_a_document_that_is_cut_goes_on_as_a_document_of_its_own(tmp_path: Path) -> None:
    tokens = list(range(10, 10 + LENGTH + 6))
    contents = [([7, 8, 9, 6], [IGNORED, 8, 9, 6]), (tokens, [IGNORED, *tokens[1:]])]
    with spooled(tmp_path, contents) as spool:
        arrays = written(tmp_path, spool, pack_documents("wrapped", spool.lengths, LENGTH))
    assert pieces(arrays, 0) == [contents[0], (tokens[:20], [IGNORED, *tokens[1:20]])]
    assert pieces(arrays, 1) == [(tokens[20:], [IGNORED, *tokens[21:]])]


def test_no_rows_are_a_file_all_the_same(tmp_path: Path) -> None:
    with DocumentSpool(tmp_path) as spool:
        packed = pack_documents("wrapped", [], LENGTH)
        assert len(packed) == 0
        written(tmp_path, spool, packed)
        assert count_supervised(spool, packed, LENGTH).tolist() == []
