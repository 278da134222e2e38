"""find_missing: what a stage's pods would mount and is not there. Called by reconcile.py before an attempt is begun.

A missing Secret would leave a pod in ContainerCreating without a word in its status, so it is looked for beforehand.
Of a Secret no more is told than whether the key is there: who reads the status may not be one who may read the Secret.
"""

from __future__ import annotations

from finetune_operator.api.constants import Reason
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.core.failure import Waiting
from finetune_operator.core.inputs import Start, secret_references
from finetune_operator.core.observed import Observed


def find_missing(job: FineTuneJob, observed: Observed, start: Start) -> Waiting | None:
    """What the attempt's pods would mount and is not there, or None. A pending claim may wait for its first pod."""
    claim = observed.claim
    if claim is not None and claim.phase is None:
        return Waiting(
            Reason.CLAIM_MISSING,
            f"PersistentVolumeClaim {claim.name} does not exist in namespace {job.namespace}: create it, or correct "
            "spec.workspace.claimName (suspend the job first).",
        )
    if claim is not None and claim.phase == "Lost":
        return Waiting(
            Reason.CLAIM_NOT_BOUND,
            f"PersistentVolumeClaim {claim.name} has lost its volume: restore that, or use another claim.",
        )
    references = secret_references(job)
    for name, key in (references[secret] for secret in start.config.secrets):
        keys = observed.secrets.get(name)
        if keys is None:
            return Waiting(
                Reason.SECRET_MISSING,
                f"Secret {name} does not exist in namespace {job.namespace}: create it with key {key}.",
            )
        if key not in keys:
            return Waiting(
                Reason.SECRET_MISSING,
                f"Secret {name} in namespace {job.namespace} has no key {key}: add it, or correct the reference in the "
                "spec (suspend the job first).",
            )
    return None
