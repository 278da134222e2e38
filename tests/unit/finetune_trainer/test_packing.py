"""Packing, the held-out share, the number of steps and the order: arithmetic with promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.packing import count_steps, iterate_order, pack_documents, split_validation

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@given(lengths=LENGTHS, packing=st.sampled_from(["bestFit", "none"]))
def test_every_document_is_in_one_row_and_no_row_overflows(lengths: list[int], packing: str) -> None:
    rows = pack_documents(packing, lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= 64 for row in rows)
    assert rows == pack_documents(packing, lengths, 64)


@given(lengths=LENGTHS)
def test_best_fit_leaves_at_most_one_row_half_empty(lengths: list[int]) -> None:
    filled = [sum(lengths[number] for number in row) for row in pack_documents("bestFit", lengths, 64)]
    assert sum(length <= 32 for length in filled) <= 1


@given(lengths=LENGTHS)
def test_best_fit_decides_as_a_search_of_all_rows_does(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(64 - length)
    rows = pack_documents("bestFit", lengths, 64)
    assert sorted(64 - sum(lengths[number] for number in row) for row in rows) == sorted(room)


@pytest.mark.parametrize("length", [pytest.param(65, id="too long"), pytest.param(0, id="empty")])
def test_a_document_that_fits_no_row_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        pack_documents("bestFit", [length], 64)


def test_dolly_like_lengths_fill_the_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).gamma(1.2, 170, 15_000).astype(int) + 20, 1, 1024).tolist()
    rows = pack_documents("bestFit", lengths, 1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.999


@given(keys=st.lists(st.integers(0, 30), max_size=100), percent=st.integers(0, 50))
def test_the_split_loses_nothing_and_keeps_equal_documents_together(keys: list[int], percent: int) -> None:
    training, held_out = split_validation(keys, percent)
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
