"""What the resource definition checks beside types and bounds: rules across fields, and what an update may change.

The rules themselves are finetune_trainer.spec_rules', once as CEL and once as Python; here their CEL gets its message
for api/schema.py. Rules that compare with the old object (immutability) exist in CEL only: transition_rules().
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from finetune_operator.api.constants import MAX_JOB_NAME_LENGTH
from finetune_operator.api.spec import FineTuneJobSpec
from finetune_trainer.spec_rules import Rule

_SHOWN = re.compile(r"\{([A-Za-z.]+)\}")


@dataclass(frozen=True)
class TransitionRule:
    """A check of an update, of the whole object against the one before."""

    field: str
    message: str
    cel: str


def message_expression(rule: Rule) -> str | None:
    """CEL that makes the rule's message with its values; None where it shows none."""
    names = _SHOWN.findall(rule.message)
    if not names:
        return None
    # The API server prices format() by its arguments' bounds, and string() of a number as if it had none.
    template = _SHOWN.sub("%s", rule.message.replace("%", "%%"))
    return f"{json.dumps(template, ensure_ascii=False)}.format([{', '.join(f'self.{name}' for name in names)}])"


NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_MESSAGE = (
    f"metadata.name must be at most {MAX_JOB_NAME_LENGTH} lower-case letters, digits and `-`, beginning with a letter: "
    "it names Jobs, Services and labels"
)

MUTABLE_FIELDS = frozenset({"suspend", "retryPolicy", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "dryRun"})
"""Fields of the spec that no stage reads. All others, later ones too, are immutable while the job runs."""


def _immutable(name: str, *, always_there: bool) -> TransitionRule:
    """The field keeps its value unless the job was suspended before the update, has ended, or was only planned.

    A dry run has a plan in its status, and a start time as long as a stage runs all the same.
    """
    new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
    same = f"{new} == {old}" if always_there else f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
    return TransitionRule(
        field=f"spec.{name}",
        message=f"spec.{name} is immutable while the job runs: set spec.suspend to true first, then change it",
        cel=f"({same}) || oldSelf.spec.suspend || (has(oldSelf.status) && (has(oldSelf.status.completionTime) || "
        "(has(oldSelf.status.plan) && !has(oldSelf.status.startTime))))",
    )


def transition_rules() -> tuple[TransitionRule, ...]:
    """The checks of an update: one for each immutable field, in the spec's order."""
    fields = ((field.alias or name, field) for name, field in FineTuneJobSpec.model_fields.items())
    return tuple(
        _immutable(name, always_there=field.is_required() or field.default is not None)
        for name, field in fields
        if name not in MUTABLE_FIELDS
    )
