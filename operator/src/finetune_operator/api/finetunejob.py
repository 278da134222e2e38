"""FineTuneJob as a typed value: parse_job makes it from an object of the API server, or says everything that is wrong.

Called by the handlers with what a watch delivers. The API server has checked the object against the CRD already; the
same checks run here for objects that an older CRD let in, and for manifests that never saw an API server. No I/O, no
clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from finetune_operator.api.constants import API_VERSION, KIND, MAX_JOB_NAME_LENGTH
from finetune_operator.api.features import unavailable_features
from finetune_operator.api.problems import Problem, SpecError
from finetune_operator.api.rules import NAME_MESSAGE, NAME_PATTERN
from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.api.status import FineTuneJobStatus
from finetune_trainer.spec_checks import check_rules, check_spec

__all__ = [
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "Problem",
    "SpecError",
    "parse_job",
    "parse_spec",
    "parse_status",
    "unavailable_features",
]


class FineTuneJob(BaseModel):
    """One FineTuneJob: who it is, what it wishes, and what was last observed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    namespace: str
    uid: str
    generation: int
    creation_timestamp: datetime | None
    deletion_timestamp: datetime | None
    """Set from the moment on at which somebody asked for the object's deletion."""
    spec: FineTuneJobSpec
    status: FineTuneJobStatus


def parse_job(body: Mapping[str, Any]) -> FineTuneJob:
    """The FineTuneJob in `body`, defaults filled in.

    SpecError carries every problem of name and spec at once, each with the field's path, its value and a remedy.
    """
    metadata = body.get("metadata") or {}
    problems = list(_identity_problems(body, metadata))
    spec: FineTuneJobSpec | None = None
    try:
        spec = parse_spec(body.get("spec"))
    except SpecError as error:
        problems.extend(error.problems)
    if spec is None or problems:
        raise SpecError(problems)
    return FineTuneJob(
        name=metadata["name"],
        namespace=metadata.get("namespace") or "default",
        uid=metadata.get("uid") or "",
        generation=metadata.get("generation") or 0,
        creation_timestamp=metadata.get("creationTimestamp"),
        deletion_timestamp=metadata.get("deletionTimestamp"),
        spec=spec,
        status=parse_status(body.get("status")),
    )


def parse_spec(value: Any) -> FineTuneJobSpec:
    """The spec in `value`; SpecError with every problem that finetune_trainer.spec_checks finds."""
    if not isinstance(value, Mapping):
        raise SpecError(check_spec(value))
    text = _as_json_text(value)
    try:
        # The models parse fast and check types and bounds on the way; what they refuse is told by the common checks.
        spec = FineTuneJobSpec.model_validate_json(text)
        problems = check_rules(spec.plain)
    except ValidationError as error:
        problems = check_spec(json.loads(text)) or tuple(_explain(detail) for detail in error.errors(include_url=False))
    if problems:
        raise SpecError(problems)
    return spec


def parse_status(value: Any) -> FineTuneJobStatus:
    """The status in `value`; an empty one where there is none or another release wrote what this one cannot read.

    Nothing is lost by that: a status is only ever derived again, from the job's children.
    """
    if not isinstance(value, Mapping):
        return FineTuneJobStatus()
    try:
        return FineTuneJobStatus.model_validate_json(_as_json_text(value))
    except ValidationError:
        return FineTuneJobStatus()


def _as_json_text(value: Any) -> str:
    """JSON of an object that may hold read-only mappings of a framework; JSON is what the models parse strictly."""
    return json.dumps(value, default=dict)


def _identity_problems(body: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[Problem]:
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if field in body and body[field] != expected:
            yield Problem(field, body[field], f"must be {expected}, is {body[field]!r}")
    name = metadata.get("name")
    if not isinstance(name, str) or len(name) > MAX_JOB_NAME_LENGTH or re.fullmatch(NAME_PATTERN, name) is None:
        yield Problem("metadata.name", name, NAME_MESSAGE)


def _explain(detail: ErrorDetails) -> Problem:
    """A Problem in the words of the model library, for what only that finds: a null where a default would stand."""
    path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    return Problem(path, detail["input"], f"{detail['msg']}, is {detail['input']!r}")
