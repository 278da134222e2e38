"""The base class and the string types of every model of the API.

Models are frozen, refuse unknown fields, and are written camelCase in YAML and snake_case in Python. The CRD is made
from their JSON schema, so every string, list and map has a bound: the API server needs them to price the rules.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

INT_OR_STRING = "x-kubernetes-int-or-string"


class Model(BaseModel):
    """A part of the spec: immutable, nothing beside the declared fields."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    def as_json(self) -> dict[str, Any]:
        """The camelCase JSON object, defaults filled in, absent optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(BaseModel):
    """A part of the status: as Model, but fields of other releases are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def as_json(self) -> dict[str, Any]:
        """The camelCase JSON object without the fields that are not known."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _quantity_text(value: object) -> object:
    """A Kubernetes quantity may be written as a number; text is the one form it has from here on."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _whole_seconds(value: datetime) -> datetime:
    """Kubernetes keeps whole seconds in UTC; finer ones would make an unchanged status look changed."""
    return (
        (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).astimezone(timezone.utc).replace(microsecond=0)
    )


Timestamp = Annotated[datetime, AfterValidator(_whole_seconds)]

QUANTITY_PATTERN = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)

DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
DnsName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$")]
LabelKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=317,
        pattern=r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$",
    ),
]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)?$")]
ImageReference = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9][-A-Za-z0-9._/:@]*$")]
Revision = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][-A-Za-z0-9._/]*$")]
Source = Annotated[str, Field(min_length=1, max_length=512)]
Quantity = Annotated[
    Annotated[str, Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN)],
    BeforeValidator(_quantity_text),
    Field(json_schema_extra={INT_OR_STRING: True}),
]
