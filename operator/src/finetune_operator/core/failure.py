"""The failure doctor: what an attempt's pods say about its end, as one Outcome with reason, evidence and remedy.

Called by stages.py. The tables below decide what is tried again and what uses up retryPolicy.maxRetries:

* the spec or the data is wrong, an artifact is damaged, the device's memory does not suffice: fails at once, since the
  same inputs end the same way;
* the cluster took the pod away (deleted, evicted, preempted, node lost), or it stopped itself after a checkpoint:
  tried again, not counted;
* everything else (network, a peer's fault, host memory, a crash): tried again, counted.

With several pods the cause is what went wrong first, except that a cause of the first kind always wins: the other ranks
only notice that a peer is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

from finetune_operator.api.constants import Reason
from finetune_operator.core.observed import Attempt, Pod, Terminated
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.times import UTC
from finetune_trainer import contract
from finetune_trainer.contract import ExitCode


@dataclass(frozen=True)
class Rule:
    """What one kind of end means. `remedy` is a sentence for the person who reads the status; {stage} is filled in."""

    result: Result
    reason: Reason
    counts: bool
    remedy: str


EXIT_RULES: Mapping[int, Rule] = MappingProxyType(
    {
        ExitCode.USER_ERROR: Rule(
            Result.FAIL,
            Reason.USER_ERROR,
            False,
            "Correct the spec; if it was the data, suspend and resume the job after that.",
        ),
        ExitCode.RETRYABLE: Rule(Result.RETRY, Reason.RETRYABLE_ERROR, True, "It is tried again."),
        ExitCode.OUT_OF_HOST_MEMORY: Rule(
            Result.RETRY,
            Reason.OUT_OF_HOST_MEMORY,
            True,
            "If it repeats, raise stages.{stage}.resources.limits.memory.",
        ),
        ExitCode.OUT_OF_DEVICE_MEMORY: Rule(
            Result.FAIL,
            Reason.OUT_OF_DEVICE_MEMORY,
            False,
            "Lower training.microBatchSize or dataset.maxLength, or split the model further.",
        ),
        ExitCode.CORRUPT_ARTIFACT: Rule(
            Result.FAIL,
            Reason.CORRUPT_ARTIFACT,
            False,
            "Remove the named folder from the workspace volume, then suspend and resume the job.",
        ),
        ExitCode.INTERRUPTED: Rule(Result.RETRY, Reason.INTERRUPTED, False, "The next attempt goes on from there."),
    }
)
"""By exit code of the contract; any other code is CRASH."""

CRASH = Rule(Result.RETRY, Reason.UNEXPECTED_ERROR, True, "It is tried again; if it repeats, read the log of the pod.")
OOM_KILLED = EXIT_RULES[ExitCode.OUT_OF_HOST_MEMORY]
DELETED = Rule(Result.RETRY, Reason.POD_DELETED, False, "The next attempt goes on from the last checkpoint.")
REPORT_MISSING = Rule(
    Result.RETRY, Reason.REPORT_MISSING, True, "Check that stages.{stage}.image is the trainer of this release."
)
LOCAL_STORAGE = Rule(
    Result.RETRY, Reason.EVICTED, True, "Raise the ephemeral-storage limit of stages.{stage}.resources."
)
ADMISSION = Rule(Result.RETRY, Reason.POD_FAILED, False, "The node refused the pod; it is tried again.")

DISRUPTION_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "PreemptionByScheduler": Rule(
            Result.RETRY, Reason.PREEMPTED, False, "It goes on from the last checkpoint when there is room."
        ),
        "EvictionByEvictionAPI": Rule(Result.RETRY, Reason.EVICTED, False, "It goes on from the last checkpoint."),
        "DeletionByTaintManager": Rule(
            Result.RETRY, Reason.NODE_LOST, False, "It goes on elsewhere from the last checkpoint."
        ),
        "DeletionByPodGC": Rule(
            Result.RETRY, Reason.NODE_LOST, False, "It goes on elsewhere from the last checkpoint."
        ),
        "TerminationByKubelet": Rule(Result.RETRY, Reason.EVICTED, False, "It goes on from the last checkpoint."),
    }
)
"""By reason of the pod's DisruptionTarget condition."""
_OTHER_DISRUPTION = DISRUPTION_RULES["EvictionByEvictionAPI"]

_DETERMINISTIC = frozenset(
    {Reason.USER_ERROR, Reason.CORRUPT_ARTIFACT, Reason.OUT_OF_HOST_MEMORY, Reason.OUT_OF_DEVICE_MEMORY}
)
_KILLED_BY_DELETION = frozenset({ExitCode.INTERRUPTED, 137, 143})
_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class _Cause:
    """One pod's end. `at` is when it began to go wrong."""

    pod: Pod
    rule: Rule
    at: datetime
    evidence: str

    @property
    def order(self) -> tuple[bool, datetime, bool, int]:
        return (self.rule.reason not in _DETERMINISTIC, self.at, self.rule.counts, self.pod.index)


def derive_outcome(attempt: Attempt) -> Outcome | None:
    """How the attempt ended, or None while it is under way or when it has no Job to judge."""
    if attempt.recorded is not None:
        return attempt.recorded
    job = attempt.job
    if job is None or job.deleting:
        return None
    causes = [_cause(pod) for pod in attempt.pods if pod.has_failed]
    if causes:
        return _failed(attempt, min(causes, key=lambda cause: cause.order))
    succeeded = {pod.index: pod for pod in attempt.pods if pod.has_succeeded}
    if len(succeeded) >= job.completions:
        return _succeeded(attempt, succeeded[min(succeeded)])
    if job.failed is not None or job.complete:
        # Its pods went before they were seen to end: deleted by hand, or with their node.
        words = job.failed.message if job.failed is not None else "the Job is complete and its pods are gone"
        return _ended(attempt, DELETED, f"A pod of Job {attempt.name} went away before its end was seen ({words}).")
    return None


def _succeeded(attempt: Attempt, pod: Pod) -> Outcome:
    text = pod.terminated.message if pod.terminated else ""
    try:
        report = contract.parse_report(text)
    except contract.ContractError as error:
        evidence = f"Pod {pod.name} exited with code 0 without a valid report: {error}."
        return _ended(attempt, REPORT_MISSING, evidence, pod)
    missing = [name for name in required_artifacts(attempt.stage) if name not in report.artifacts]
    if report.stage != attempt.stage:
        evidence = f"Pod {pod.name} exited with code 0, but its report is of stage {report.stage}."
        return _ended(attempt, REPORT_MISSING, evidence, pod)
    if missing:
        evidence = f"Pod {pod.name} exited with code 0, but its report has no artifact {', '.join(missing)}."
        return _ended(attempt, REPORT_MISSING, evidence, pod)
    finished = [p.terminated.finished_at for p in attempt.pods if p.terminated and p.terminated.finished_at]
    reason = Reason.REUSED if report.reused else Reason.COMPLETED
    return Outcome(
        result=Result.SUCCEEDED,
        reason=reason,
        message=report.message,
        exit_code=0,
        started_at=attempt.job.created_at if attempt.job else None,
        finished_at=max(finished, default=None),
        report=report,
    )


def required_artifacts(stage: str) -> tuple[str, ...]:
    """The artifacts that a stage's report must have for the stage to be done."""
    return (stage, contract.MODEL_INPUT) if stage == contract.PREPARE else (stage,)


def _failed(attempt: Attempt, cause: _Cause) -> Outcome:
    return _ended(attempt, cause.rule, cause.evidence, cause.pod)


def _ended(attempt: Attempt, rule: Rule, evidence: str, pod: Pod | None = None) -> Outcome:
    ended = pod.terminated if pod else None
    return Outcome(
        result=rule.result,
        reason=rule.reason,
        message=f"{evidence} {rule.remedy.format(stage=attempt.stage)}",
        counts=rule.counts,
        exit_code=ended.exit_code if ended else None,
        started_at=attempt.job.created_at if attempt.job else None,
        finished_at=ended.finished_at if ended else None,
        report=_find_report(ended),
    )


def _find_report(ended: Terminated | None) -> contract.Report | None:
    if ended is None:
        return None
    try:
        return contract.parse_report(ended.message)
    except contract.ContractError:
        return None  # the kubelet's words or the end of a log: evidence, but no report


def _cause(pod: Pod) -> _Cause:
    ended = pod.terminated
    where = f"Pod {pod.name}" + (f" on node {pod.node}" if pod.node else "")
    finished = (ended.finished_at if ended else None) or pod.deletion_requested_at or _EARLIEST
    report = _find_report(ended)
    if ended is not None and ended.exit_code in (ExitCode.USER_ERROR, ExitCode.CORRUPT_ARTIFACT):
        return _Cause(pod, EXIT_RULES[ended.exit_code], finished, f"{where}: {_words(ended, report)}")
    if pod.disruption is not None:
        rule = DISRUPTION_RULES.get(pod.disruption.reason, _OTHER_DISRUPTION)
        words = _sentence(pod.disruption.message)
        evidence = f"{where} was stopped ({pod.disruption.reason}): {words}"
        return _Cause(pod, rule, pod.deletion_requested_at or finished, evidence)
    if pod.status is not None and pod.status.reason:
        rule = ADMISSION
        if pod.status.reason == "Evicted":
            own_fault = "ephemeral" in pod.status.message or "emptyDir" in pod.status.message
            rule = LOCAL_STORAGE if own_fault else DISRUPTION_RULES["TerminationByKubelet"]
        elif pod.status.reason in ("NodeLost", "Terminated", "NodeShutdown"):
            rule = DISRUPTION_RULES["TerminationByKubelet"]
        return _Cause(pod, rule, finished, f"{where} failed ({pod.status.reason}): {_sentence(pod.status.message)}")
    if ended is None:
        return _Cause(pod, DELETED, finished, f"{where} went away before its container ended.")
    if ended.reason == "OOMKilled":
        return _Cause(pod, OOM_KILLED, finished, f"{where} was killed for using more memory than its limit.")
    if pod.deletion_requested_at is not None and ended.exit_code in _KILLED_BY_DELETION:
        at = pod.deletion_requested_at
        if at <= finished + timedelta(seconds=1):
            return _Cause(pod, DELETED, at, f"{where} was deleted and stopped with code {ended.exit_code}.")
    return _Cause(pod, EXIT_RULES.get(ended.exit_code, CRASH), finished, f"{where}: {_words(ended, report)}")


def _words(ended: Terminated, report: contract.Report | None) -> str:
    if report is not None and (report.reason or report.message):
        return _sentence(f"{report.reason}: {report.message}" if report.reason else report.message)
    signal = f", signal {ended.signal}" if ended.signal else ""
    why = f" ({ended.reason})" if ended.reason and ended.reason != "Error" else ""
    tail = ended.message.strip()
    said = f" Its last words: {tail[-1000:]}" if tail else ""
    return f"the container exited with code {ended.exit_code}{signal}{why}.{said}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith((".", "!", "?", "…")) else f"{text}."


@dataclass(frozen=True)
class Waiting:
    """Why a pod of an attempt under way does not run yet, in Kubernetes' own words."""

    reason: Reason
    message: str


WAITING_REASONS: Mapping[str, Reason] = MappingProxyType(
    {
        "ErrImagePull": Reason.IMAGE_PULL_FAILED,
        "ImagePullBackOff": Reason.IMAGE_PULL_FAILED,
        "ErrImageNeverPull": Reason.IMAGE_PULL_FAILED,
        "InvalidImageName": Reason.IMAGE_PULL_FAILED,
        "CreateContainerConfigError": Reason.CONTAINER_CONFIG_ERROR,
        "CreateContainerError": Reason.CONTAINER_CONFIG_ERROR,
        "RunContainerError": Reason.CONTAINER_CONFIG_ERROR,
    }
)
"""By reason of the container's waiting state; the others (ContainerCreating) are only the start."""


def find_waiting(attempt: Attempt) -> Waiting | None:
    """The first pod's trouble in starting, or None when every pod runs, has ended, or is only being started."""
    for pod in attempt.pods:
        if pod.has_ended or pod.running:
            continue
        if pod.waiting is not None and pod.waiting.reason in WAITING_REASONS:
            words = _sentence(pod.waiting.message or pod.waiting.reason)
            message = f"Pod {pod.name} cannot start ({pod.waiting.reason}): {words}"
            return Waiting(WAITING_REASONS[pod.waiting.reason], message)
        if pod.unschedulable is not None:
            claim = "PersistentVolumeClaim" in pod.unschedulable.message
            reason = Reason.CLAIM_NOT_BOUND if claim else Reason.UNSCHEDULABLE
            return Waiting(reason, f"Pod {pod.name} has no node: {_sentence(pod.unschedulable.message)}")
    return None
