"""Kubernetes quantities as exact numbers: "500m" is 0.5, "2Gi" is 2147483648, "1E" is 10**18 and "1E3" is 1000.

Called by preflight.py and plan.py, which compare what a stage asks for with what quotas and instances have. Decimal,
since a quota that is met exactly must not be missed by a rounding error. Grammar and suffixes: Kubernetes' API
reference, "Quantity" (apimachinery/pkg/api/resource/quantity.go).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any

_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?:(?P<suffix>[KMGTPE]i|[numkMGTPE])|[eE](?P<exponent>[+-]?[0-9]+))?"
)
_MAX_EXPONENT = 100
_SUFFIXES: Mapping[str, Decimal] = MappingProxyType(
    {
        **{
            suffix: Decimal(10) ** power
            for suffix, power in zip("numkMGTPE", (-9, -6, -3, 3, 6, 9, 12, 15, 18), strict=True)
        },
        **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", 1)},
    }
)
_BINARY = tuple((f"{suffix}i", Decimal(1024) ** power) for power, suffix in reversed(list(enumerate("KMGTPE", 1))))


def parse_quantity(value: Any) -> Decimal:
    """The number of a quantity: text in the API, a number too where people write it. ValueError for what is none."""
    text = str(value) if isinstance(value, (str, int, Decimal)) and not isinstance(value, bool) else ""
    found = _FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{value!r} is no Kubernetes quantity, such as 500m, 2 or 16Gi")
    number = Decimal(found["number"])
    if found["suffix"]:
        return number * _SUFFIXES[found["suffix"]]
    exponent = int(found["exponent"] or 0)
    if abs(exponent) > _MAX_EXPONENT:
        raise ValueError(f"{value!r} is beyond what a Kubernetes quantity can be")
    return number.scaleb(exponent)


def parse_quantities(values: Mapping[str, Any] | None) -> dict[str, Decimal]:
    """A resource list, such as a container's requests; ValueError names the resource whose quantity is none."""
    found = {}
    for name, value in (values or {}).items():
        try:
            found[name] = parse_quantity(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def format_quantity(value: Decimal, resource: str = "") -> str:
    """The quantity for people: bytes of memory and storage in the largest binary unit of which they are at least 1 and
    two decimals (exact to that), all else as a plain number."""
    if resource.rpartition(".")[2] in ("memory", "storage", "ephemeral-storage") or "hugepages-" in resource:
        for suffix, size in _BINARY:
            if abs(value) >= size:
                return f"{_plain(round(value / size, 2))}{suffix}"
    return _plain(value)


def _plain(value: Decimal) -> str:
    """Without an exponent and without zeros that say nothing: 2, 0.5."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
