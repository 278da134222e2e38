"""Lists of status conditions as immutable values: find one, set one, in a stable order.

Called by the code that derives a status. Time is an argument. A condition's lastTransitionTime moves only when its
status does, as the Kubernetes API conventions ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from finetune_operator.api.constants import ConditionType
from finetune_operator.api.status import Condition, ConditionStatus

_ORDER = {str(condition_type): position for position, condition_type in enumerate(ConditionType)}
MESSAGE_MAX_LENGTH = 32768


def find_condition(conditions: Iterable[Condition], condition_type: str) -> Condition | None:
    """The condition of that type, or None."""
    return next((condition for condition in conditions if condition.type == condition_type), None)


def cut_message(message: str) -> str:
    """The message within the API's bound, marked with an ellipsis where it was longer."""
    return message if len(message) <= MESSAGE_MAX_LENGTH else message[: MESSAGE_MAX_LENGTH - 1] + "…"


def with_condition(
    conditions: Iterable[Condition],
    condition_type: ConditionType,
    status: ConditionStatus,
    reason: str,
    message: str,
    *,
    observed_generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """The conditions with this one set, in the order of ConditionType (unknown types last, by name).

    A condition that had the same status keeps its lastTransitionTime; reason, message and observedGeneration are
    always the new ones. A message beyond the API's bound is cut with an ellipsis.
    """
    kept = list(conditions)
    before = find_condition(kept, condition_type)
    since = before.last_transition_time if before is not None and before.status == status else now
    message = cut_message(message)
    fresh = Condition(
        type=str(condition_type),
        status=status,
        reason=str(reason),
        message=message,
        observed_generation=observed_generation,
        last_transition_time=since,
    )
    others = [condition for condition in kept if condition.type != condition_type]
    return tuple(
        sorted([*others, fresh], key=lambda condition: (_ORDER.get(condition.type, len(_ORDER)), condition.type))
    )
