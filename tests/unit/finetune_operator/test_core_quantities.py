from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.quantities import format_quantity, parse_quantities, parse_quantity

SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1), "k": Decimal(10**3),
    "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40), "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}  # fmt: skip


@given(st.integers(-(10**12), 10**12), st.integers(0, 6), st.sampled_from(sorted(SUFFIXES)))
def test_number_and_suffix_are_multiplied_exactly(digits: int, places: int, suffix: str) -> None:
    number = Decimal(digits).scaleb(-places)
    assert parse_quantity(f"{number:f}{suffix}") == number * SUFFIXES[suffix]


@given(st.integers(-999, 999), st.integers(-9, 18), st.sampled_from("eE"))
def test_an_exponent_is_no_suffix(number: int, exponent: int, sign: str) -> None:
    assert parse_quantity(f"{number}{sign}{exponent}") == Decimal(number).scaleb(exponent)


@given(st.integers(0, 2**62))
def test_a_whole_number_is_itself_as_text_and_as_a_number(number: int) -> None:
    assert parse_quantity(number) == parse_quantity(str(number)) == number


@given(st.integers(0, 10**15), st.sampled_from(["cpu", "pods", "aws.amazon.com/neuron"]))
def test_what_is_no_memory_is_written_so_that_it_is_read_as_the_same(thousandths: int, resource: str) -> None:
    value = Decimal(thousandths) / 1000
    assert parse_quantity(format_quantity(value, resource)) == value


@given(st.integers(0, 2**60))
def test_memory_is_written_to_within_half_a_hundredth_of_its_unit(size: int) -> None:
    text = format_quantity(Decimal(size), "requests.memory")
    unit = SUFFIXES[text.lstrip("0123456789.")]
    assert abs(parse_quantity(text) - size) <= unit / 200


@pytest.mark.parametrize(
    ("text", "resource", "shown"),
    [
        ("500m", "cpu", "0.5"),
        ("119", "cpu", "119"),
        ("461Gi", "memory", "461Gi"),
        ("1536Mi", "limits.memory", "1.5Gi"),
        ("1000", "memory", "1000"),
        ("100G", "requests.ephemeral-storage", "93.13Gi"),
        ("1e3", "count/pods", "1000"),
        ("0", "cpu", "0"),
    ],
)
def test_a_quantity_is_shown_for_people(text: str, resource: str, shown: str) -> None:
    assert format_quantity(parse_quantity(text), resource) == shown


@pytest.mark.parametrize(
    "wrong", ["", "lots", "1 Gi", "1GiB", "Gi", "1e", "1e1000", "--1", "0x10", True, None, 1.5, []]
)
def test_what_is_no_quantity_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(wrong)


def test_a_list_of_resources_names_the_one_that_is_wrong() -> None:
    assert parse_quantities({"cpu": "1", "memory": 2}) == {"cpu": 1, "memory": 2}
    assert parse_quantities(None) == {}
    with pytest.raises(ValueError, match="^memory: 'lots' is no"):
        parse_quantities({"cpu": "1", "memory": "lots"})
