"""The failure doctor: what an attempt's pods, nodes and Job say about its end, as one Outcome.

Called by stages.py. This module gathers the evidence of each pod; failure_rules.py has the table that says what it
means; here the cause is chosen when several pods ended:

* a pod that says itself what is wrong with it (spec, data, memory, a damaged artifact) is the cause, however late;
* then a node that is faulty, gone or silent: the other ranks only notice that a peer is gone;
* then what went wrong first, but a rank that lost a peer never before that peer.

While a peer sits on a node that is watched, an end that would be counted is not judged yet: a dead node shows only
after tens of seconds, what its peers say comes at once, and the next attempt has to wait for that pod anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType

from finetune_operator.api.constants import Reason
from finetune_operator.core.failure_rules import Evidence, Node, Rule, Verdict, find_rule
from finetune_operator.core.log_tail import clean_tail, mask_secrets
from finetune_operator.core.nodes import NodeFault, NodeState, find_fault
from finetune_operator.core.observed import Attempt, Note, Pod, StageJob, Terminated
from finetune_operator.core.records import Outcome, Result
from finetune_operator.core.times import UTC
from finetune_trainer import contract

PATIENCE_SECONDS = 90
"""How long a counted end waits for what is found of the peers' nodes: node-monitor-grace-period is 40 or 50 s, and a
pod's grace period is meant to be shorter."""
_TERMINATION_LINES = 12
"""Of a termination message that is no report: the end of the container's log."""
_STATES: Mapping[Reason, Node] = MappingProxyType({Reason.NODE_FAULT: Node.FAULTY, Reason.NODE_LOST: Node.LOST})
"""By the reason of a node's fault."""
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_NONE: Mapping[str, NodeState] = MappingProxyType({})
_NO_EVENTS: Mapping[str, Note] = MappingProxyType({})


@dataclass(frozen=True)
class Hang:
    """A stage that posted progress and stopped: its last step, seconds since it advanced, seconds that are allowed."""

    step: int | None
    seconds: float
    limit_seconds: float

    @property
    def words(self) -> str:
        """The evidence as a clause."""
        step = "no progress" if self.step is None else f"no step after step {self.step}"
        return f"{step} for {self.seconds:.0f} seconds, {self.limit_seconds:.0f} are allowed"


@dataclass(frozen=True)
class Waiting:
    """Why a stage does not start, in Kubernetes' own words and with what to do."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class _Cause:
    """One pod's end. `at` is when it began to go wrong; `pod` is None where the Job alone says it."""

    rule: Rule
    evidence: Evidence
    at: datetime = _EARLIEST
    pod: Pod | None = None

    @property
    def order(self) -> tuple[int, datetime, bool, int]:
        counted = self.rule.verdict is Verdict.COUNTED
        return (self.rule.precedence, self.at, counted, self.pod.index if self.pod else 0)


def derive_outcome(
    attempt: Attempt,
    *,
    nodes: Mapping[str, NodeState] = _NONE,
    deleted_nodes: frozenset[str] = frozenset(),
    hung: Hang | None = None,
    now: datetime | None = None,
) -> Outcome | None:
    """How the attempt ended or has to end, or None while it goes on or when it has no Job to judge.

    `nodes` are the cluster's by name as far as they are watched, `deleted_nodes` those that went away meanwhile. A pod
    on a faulty node ends the attempt although it still runs. Without `now` nothing is waited for.
    """
    if attempt.recorded is not None:
        return attempt.recorded
    job = attempt.job
    if job is None or job.deleting or (job.suspended and not job.is_over):
        return None  # pods of a suspended Job are being preempted: it goes on when it is admitted again
    pods = [pod for pod in attempt.pods if not _is_left_over(pod, job)]
    causes = [_judge(attempt, pod, _node_fault(pod, nodes, deleted_nodes)) for pod in pods if pod.has_failed]
    succeeded = {pod.index: pod for pod in pods if pod.has_succeeded}
    if not causes and len(succeeded) >= job.completions:
        return _succeeded(attempt, succeeded[min(succeeded)])
    live = [pod for pod in pods if not pod.has_ended]
    for pod in live:
        fault = _node_fault(pod, nodes, deleted_nodes)
        if fault is not None:
            causes.append(_judge(attempt, pod, fault))
    if not causes:
        return _without_pods(attempt, job, hung, live)
    cause = min(causes, key=lambda each: each.order)
    if cause.rule.verdict is Verdict.COUNTED and _may_be_a_nodes_fault(cause, live, nodes, now):
        return None
    return _ended(attempt, cause)


def required_artifacts(stage: str) -> tuple[str, ...]:
    """The artifacts that a stage's report must have for the stage to be done."""
    return (stage, contract.MODEL_INPUT) if stage == contract.PREPARE else (stage,)


def find_waiting(attempt: Attempt, *, events: Mapping[str, Note] = _NO_EVENTS) -> Waiting | None:
    """The first trouble in starting the attempt's pods, or None when each runs, has ended, or is only being started.

    `events` has the newest warning event by the name of the pod or Job that it is about, where somebody looked: failed
    mounts and refused pods are told nowhere else.
    """
    for pod in attempt.pods:
        if not pod.has_ended and not pod.running:
            waiting = _waiting(_why_not_started(attempt, pod, events.get(pod.name)))
            if waiting is not None:
                return waiting
    event = events.get(attempt.name)
    if event is None or attempt.job is None or len(attempt.pods) >= attempt.job.completions:
        return None
    evidence = Evidence(f"Job {attempt.name}", attempt.stage, event_reason=event.reason, event_message=event.message)
    return _waiting(evidence)


def judge_refusal(kind: str, name: str, stage: str, http_status: int, words: str) -> Waiting | None:
    """What the API server's refusal to create a child means; None when it is the server's own trouble."""
    return _waiting(Evidence(f"{kind} {name}", stage, http_status=http_status, refusal=words))


def _waiting(evidence: Evidence) -> Waiting | None:
    rule = find_rule(evidence)
    return None if rule is None else Waiting(rule.reason, rule.message(evidence))


def _why_not_started(attempt: Attempt, pod: Pod, event: Note | None) -> Evidence:
    return Evidence(
        subject=_place(pod),
        stage=attempt.stage,
        container_reason=pod.waiting.reason if pod.waiting else "",
        container_message=pod.waiting.message if pod.waiting else "",
        unschedulable=(pod.unschedulable.message or pod.unschedulable.reason) if pod.unschedulable else "",
        event_reason=event.reason if event else "",
        event_message=event.message if event else "",
    )


def _is_left_over(pod: Pod, job: StageJob) -> bool:
    """True for a pod that was stopped by a suspension of its Job (Kueue's preemption), which runs again meanwhile.

    The Job controller sets status.startTime anew when a Job is resumed; for a moment it has none.
    """
    stopped_at = pod.deletion_requested_at
    return stopped_at is not None and job.queued and (job.started_at is None or stopped_at <= job.started_at)


def _node_fault(pod: Pod, nodes: Mapping[str, NodeState], deleted_nodes: frozenset[str]) -> NodeFault | None:
    if pod.node is None:
        return None
    return find_fault(nodes.get(pod.node), deleted=pod.node in deleted_nodes)


def _may_be_a_nodes_fault(
    cause: _Cause, live: Iterable[Pod], nodes: Mapping[str, NodeState], now: datetime | None
) -> bool:
    """True while a peer that has not ended may yet turn out to sit on a dead node."""
    peers = [pod for pod in live if pod.node is not None and pod.node in nodes]
    if not peers or now is None or (cause.pod is not None and cause.pod.node in {pod.node for pod in peers}):
        return False
    return now < cause.at + timedelta(seconds=PATIENCE_SECONDS)


def _without_pods(attempt: Attempt, job: StageJob, hung: Hang | None, live: list[Pod]) -> Outcome | None:
    """The outcome that no pod's end shows: the Job's own, or a hang."""
    evidence = Evidence(f"Job {attempt.name}", attempt.stage, over=True)
    pod = None
    if job.is_over:
        # Its pods went before they were seen to end: deleted by hand, or with their node.
        words = job.failed if job.failed is not None else Note("Complete", "the Job is complete and its pods are gone")
        evidence = replace(evidence, podless=True, job_reason=words.reason, job_message=words.message)
        pod = live[0] if live else None
    elif hung is not None:
        evidence = replace(evidence, hang=hung.words)
        pod = live[0] if live else None
    else:
        return None
    rule = find_rule(evidence)
    return None if rule is None else _ended(attempt, _Cause(rule, evidence, pod=pod))


def _judge(attempt: Attempt, pod: Pod, fault: NodeFault | None) -> _Cause:
    """The cause that this pod's end, or its node, amounts to."""
    ended, report = pod.terminated, _find_report(pod.terminated)
    finished_at = (ended.finished_at if ended else None) or pod.deletion_requested_at or _EARLIEST
    asked_at = pod.deletion_requested_at
    # A second of slack: both times are rounded to whole seconds.
    deleted = asked_at is not None and (ended is None or asked_at <= finished_at + timedelta(seconds=1))
    failed = attempt.job.failed if attempt.job is not None else None
    evidence = Evidence(
        subject=_place(pod),
        stage=attempt.stage,
        words=_words(ended, report),
        over=True,
        exit_code=ended.exit_code if ended else None,
        container_reason=ended.reason if ended else "",
        container_message=mask_secrets(ended.message) if ended else "",
        stage_reason=report.reason if report else "",
        pod_reason=pod.status.reason if pod.status else "",
        pod_message=pod.status.message if pod.status else "",
        disruption_reason=pod.disruption.reason if pod.disruption else "",
        disruption_message=pod.disruption.message if pod.disruption else "",
        deleted=deleted,
        node=_STATES[fault.reason] if fault is not None else Node.SOUND,
        node_evidence=fault.evidence if fault is not None else "",
        node_remedy=fault.remedy if fault is not None else "",
        job_reason=failed.reason if failed is not None else "",
        job_message=failed.message if failed is not None else "",
    )
    rule = find_rule(evidence)
    if rule is None:
        raise ValueError(f"no rule for {evidence}")  # the table ends with a row for every end
    disrupted = deleted and (rule.reason is Reason.POD_DELETED or pod.disruption is not None)
    return _Cause(rule, evidence, asked_at if disrupted and asked_at is not None else finished_at, pod)


def _succeeded(attempt: Attempt, pod: Pod) -> Outcome:
    text = pod.terminated.message if pod.terminated else ""
    problem, report = "", None
    try:
        report = contract.parse_report(text)
    except contract.ContractError as error:
        problem = f"without a valid report: {mask_secrets(str(error))}"
    if report is not None:
        missing = [name for name in required_artifacts(attempt.stage) if name not in report.artifacts]
        if report.stage != attempt.stage:
            problem = f"its report is of stage {report.stage}"
        elif missing:
            problem = f"its report has no artifact {', '.join(missing)}"
    if problem or report is None:
        evidence = Evidence(_place(pod), attempt.stage, over=True, exit_code=0, report_problem=problem)
        rule = find_rule(evidence)
        if rule is None:
            raise ValueError(f"no rule for {evidence}")
        return _ended(attempt, _Cause(rule, evidence, pod=pod))
    finished = [p.terminated.finished_at for p in attempt.pods if p.terminated and p.terminated.finished_at]
    return Outcome(
        result=Result.SUCCEEDED,
        reason=Reason.REUSED if report.reused else Reason.COMPLETED,
        message=report.message,
        exit_code=0,
        started_at=attempt.job.created_at if attempt.job else None,
        finished_at=max(finished, default=None),
        report=report,
        nodes=_nodes(attempt),
    )


def _ended(attempt: Attempt, cause: _Cause) -> Outcome:
    pod, rule = cause.pod, cause.rule
    ended = pod.terminated if pod else None
    report = _find_report(ended)
    step = report.metrics.get("step") if report is not None else None
    # Of a gang that hangs, or whose time is over, no single node is to blame.
    blamed = pod is not None and (pod.has_ended or cause.evidence.node is not Node.SOUND or len(attempt.pods) == 1)
    return Outcome(
        result=Result.FAIL if rule.verdict is Verdict.FAIL else Result.RETRY,
        reason=rule.reason,
        message=rule.message(cause.evidence),
        counts=rule.verdict is Verdict.COUNTED,
        exit_code=ended.exit_code if ended else None,
        started_at=attempt.job.created_at if attempt.job else None,
        finished_at=ended.finished_at if ended else None,
        report=report,
        pod=pod.name if pod else None,
        node=pod.node if pod and blamed else None,
        nodes=_nodes(attempt),
        step=step if isinstance(step, int) and not isinstance(step, bool) else None,
    )


def _nodes(attempt: Attempt) -> tuple[str, ...]:
    return tuple(sorted({pod.node for pod in attempt.pods if pod.node}))


def _find_report(ended: Terminated | None) -> contract.Report | None:
    if ended is None:
        return None
    try:
        return contract.parse_report(ended.message)
    except contract.ContractError:
        return None  # the kubelet's words or the end of a log: evidence, but no report


def _place(pod: Pod) -> str:
    return f"Pod {pod.name}" + (f" on node {pod.node}" if pod.node else "")


def _words(ended: Terminated | None, report: contract.Report | None) -> str:
    """What the container said at its end, or its exit code and last words; secrets masked."""
    if ended is None:
        return "its container did not report an end"
    if report is not None and (report.reason or report.message):
        message = mask_secrets(report.message)
        return f"{report.reason}: {message}" if report.reason else message
    signal = ended.signal or (ended.exit_code - 128 if 128 < ended.exit_code < 160 else 0)
    ending = f", signal {signal}" if signal else ""
    why = f" ({ended.reason})" if ended.reason and ended.reason != "Error" else ""
    tail = "\n".join(clean_tail(ended.message, lines=_TERMINATION_LINES))
    said = f". Its last words: {tail[-1000:]}" if tail else ""
    return f"the container exited with code {ended.exit_code}{ending}{why}{said}"
