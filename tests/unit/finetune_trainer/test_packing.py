"""Packing, the held-out share, the number of steps and the order: arithmetic with promises."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.packing import PACKINGS, PackedRows, count_steps, iterate_order, pack_documents, split_validation

LENGTH = 64
LENGTHS = st.lists(st.integers(1, LENGTH), max_size=200)
LONG = st.lists(st.integers(1, 5 * LENGTH), max_size=60)


def all_rows(packed: PackedRows) -> list[list[tuple[int, int, int]]]:
    return [packed.row(number) for number in range(len(packed))]


def filled(packed: PackedRows) -> list[int]:
    return [sum(end - begin for _, begin, end in row) for row in all_rows(packed)]


def first_fit(lengths: list[int]) -> int:
    """Rows that first fit takes, in the documents' order."""
    room: list[int] = []
    for length in lengths:
        row = next((row for row, left in enumerate(room) if left >= length), None)
        if row is None:
            room.append(LENGTH - length)
        else:
            room[row] -= length
    return len(room)


@given(lengths=LENGTHS, packing=st.sampled_from(PACKINGS))
def test_no_token_is_lost_none_stands_twice_and_no_row_overflows(lengths: list[int], packing: str) -> None:
    packed = pack_documents(packing, lengths, LENGTH)
    places = sorted((number, place) for row in all_rows(packed) for number, a, b in row for place in range(a, b))
    assert places == [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    assert all(0 < count <= LENGTH for count in filled(packed))
    assert packed.tokens == sum(lengths)


@given(lengths=LENGTHS, packing=st.sampled_from(["bestFit", "none"]))
def test_no_document_is_cut(lengths: list[int], packing: str) -> None:
    packed = pack_documents(packing, lengths, LENGTH)
    assert packed.cuts == 0
    assert len(packed.documents) == len(lengths)
    assert packing == "bestFit" or [row[0][0] for row in all_rows(packed)] == list(range(len(lengths)))


@given(lengths=LENGTHS, packing=st.sampled_from(["bestFit", "wrapped"]))
def test_rows_are_no_more_than_first_fit_takes(lengths: list[int], packing: str) -> None:
    assert len(pack_documents(packing, lengths, LENGTH)) <= first_fit(lengths)


@given(lengths=LONG)
def test_wrapped_keeps_the_stream_in_order_and_all_rows_but_the_last_full(lengths: list[int]) -> None:
    packed = pack_documents("wrapped", lengths, LENGTH)
    assert filled(packed)[:-1] == [LENGTH] * (len(packed) - 1)
    pieces = [piece for row in all_rows(packed) for piece in row]
    stream = [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    assert [(number, place) for number, a, b in pieces for place in range(a, b)] == stream
    # a document is cut at row ends only: it stands in one piece a row
    assert all(len({number for number, _, _ in row}) == len(row) for row in all_rows(packed))
    assert packed.cuts == len(pieces) - len(lengths)


@given(lengths=LENGTHS)
def test_best_fit_leaves_at_most_one_row_half_empty(lengths: list[int]) -> None:
    assert sum(length <= LENGTH // 2 for length in filled(pack_documents("bestFit", lengths, LENGTH))) <= 1


@given(lengths=LENGTHS)
def test_best_fit_decides_as_a_search_of_all_rows_does(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(LENGTH - length)
    packed = pack_documents("bestFit", lengths, LENGTH)
    same = sorted(filled(packed)) == sorted(LENGTH - left for left in room)
    assert same or len(packed) < len(room)


@given(lengths=LENGTHS, packing=st.sampled_from(PACKINGS), first=st.integers(0, 1000))
def test_documents_may_have_numbers_of_their_own(lengths: list[int], packing: str, first: int) -> None:
    numbers = [first + 3 * number for number in range(len(lengths))]
    plain, named = pack_documents(packing, lengths, LENGTH), pack_documents(packing, lengths, LENGTH, numbers)
    assert [[(first + 3 * number, a, b) for number, a, b in row] for row in all_rows(plain)] == all_rows(named)


@pytest.mark.parametrize(
    ("packing", "length"),
    [
        pytest.param("bestFit", 65, id="too long for a row"),
        pytest.param("none", 65, id="too long for its row"),
        pytest.param("bestFit", 0, id="empty"),
        pytest.param("wrapped", 0, id="an empty part of the stream"),
        pytest.param("greedy", 1, id="an unknown packing"),
    ],
)
def test_what_cannot_be_packed_is_an_error(packing: str, length: int) -> None:
    with pytest.raises(ValueError, match=r"must have 1 to \d+ tokens, got|packing is 'greedy'"):
        pack_documents(packing, [length], LENGTH)


def lengths_like_gamma(shape: float, scale: float, least: int, most: int, count: int) -> list[int]:
    # RandomState's stream is frozen for good, a Generator's may change with numpy
    return np.clip(np.random.RandomState(0).gamma(shape, scale, count).astype(int) + least, 1, most).tolist()  # type: ignore[no-any-return]


def test_dolly_like_lengths_fill_the_rows() -> None:
    lengths = lengths_like_gamma(1.2, 170, 20, 1024, 15_000)
    assert sum(lengths) / (len(pack_documents("bestFit", lengths, 1024)) * 1024) > 0.999


def test_a_million_documents_are_packed_within_two_seconds() -> None:
    lengths = np.array(lengths_like_gamma(2, 60, 1, 256, 1_000_000))
    began = time.process_time()
    packed = pack_documents("bestFit", lengths, 256)
    assert time.process_time() - began < 2
    assert lengths.sum() / (len(packed) * 256) > 0.995


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_is_the_same_on_every_machine(packing: str) -> None:
    # the digests are written out, so that another machine or another numpy cannot pack otherwise unnoticed
    packed = pack_documents(packing, [1 + 37 * number % 61 for number in range(5000)], LENGTH)
    arrays = (packed.starts, packed.documents, packed.begins, packed.ends)
    digest = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in arrays))
    assert digest.hexdigest()[:16] == DIGESTS[packing]


DIGESTS = {"bestFit": "314959b3026245ab", "wrapped": "abab79848b69e1ec", "none": "6225b560283f0499"}


@given(keys=st.lists(st.integers(0, 30), max_size=100), percent=st.integers(0, 50))
def test_the_split_loses_nothing_and_keeps_equal_documents_together(keys: list[int], percent: int) -> None:
    training, held_out = (part.tolist() for part in split_validation(keys, percent))
    assert sorted(training + held_out) == list(range(len(keys)))
    assert len(held_out) * 100 >= percent * len(keys)
    assert (held_out == []) == (percent == 0 or not keys)
    assert not {keys[number] for number in training} & {keys[number] for number in held_out}


def test_distinct_documents_are_split_exactly() -> None:
    assert [len(part) for part in split_validation(range(300), 2)] == [294, 6]


@pytest.mark.parametrize(
    ("rows", "batch", "options", "steps"),
    [
        pytest.param(100, 8, {"max_steps": 7, "epochs": None}, 7, id="steps are as asked"),
        pytest.param(96, 8, {"max_steps": None, "epochs": 2}, 24, id="epochs that divide"),
        pytest.param(100, 8, {"max_steps": None, "epochs": 1}, 13, id="the last batch is filled up"),
        pytest.param(100, 8, {"max_steps": None, "epochs": 0.5}, 7, id="half an epoch"),
        pytest.param(10, 1, {"max_steps": None, "epochs": 0.1}, 1, id="a tenth is exact"),
        pytest.param(3, 8, {"max_steps": None, "epochs": 1}, 1, id="fewer rows than a batch"),
    ],
)
def test_steps(rows: int, batch: int, options: dict[str, int | None], steps: int) -> None:
    assert count_steps(rows, batch, **options) == steps  # type: ignore[arg-type]


@given(rows=st.integers(1, 50), count=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_each_epoch_reads_every_row_once(rows: int, count: int, seed: int) -> None:
    order = np.concatenate(list(iterate_order(rows, count, seed)))
    assert order.dtype == np.int32
    assert len(order) == count
    for start in range(0, count - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))


def test_the_order_depends_on_the_seed_and_the_epoch_only() -> None:
    def epochs(seed: int) -> list[list[int]]:
        return [part.tolist() for part in iterate_order(8, 24, seed)]

    # written out, so that another machine or another numpy cannot give another order unnoticed
    assert epochs(42) == EPOCHS_OF_SEED_42
    assert len({tuple(epoch) for seed in (1, 2, 3) for epoch in epochs(seed)}) == 9


EPOCHS_OF_SEED_42 = [[1, 0, 5, 6, 3, 2, 7, 4], [1, 2, 6, 5, 4, 3, 0, 7], [2, 3, 6, 1, 5, 4, 7, 0]]
