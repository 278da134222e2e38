"""The failure doctor's one table: what is known of an end, a wait or a refusal -> reason, verdict, evidence, remedy.

RULES is ordered and the first row that fits wins. failure.py gathers the Evidence of each pod and asks find_rule; a
test holds the table and docs/runbook.md equal. Nothing else in the operator decides what an exit code, a pod's
condition, a node's fault, a Job's condition or the API server's refusal means.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from enum import Enum, IntEnum, StrEnum
from functools import cached_property

from finetune_operator.api.constants import Reason
from finetune_trainer.contract import ExitCode


class Node(Enum):
    """What is wrong with the node that a pod sits on."""

    SOUND = ""
    FAULTY = "faulty"
    """Marked unhealthy; its pods may still run."""
    LOST = "lost"
    """Deleted, or it does not answer: its pods cannot be asked any more."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of one pod, of a Job without pods, or of an object that was refused; empty where nothing is.

    `subject` begins the message ("Pod x on node y"), `words` are the container's own, already free of secrets.
    """

    subject: str = ""
    stage: str = ""
    words: str = ""
    over: bool = False
    """True when this is an end, or has to be one: the pod failed, its node is faulty, it hangs, its Job failed."""
    podless: bool = False
    """True for a Job of which no pod is left to ask."""
    exit_code: int | None = None
    container_reason: str = ""
    """Reason of the container's terminated state, or of its waiting state."""
    container_message: str = ""
    stage_reason: str = ""
    """Reason in the stage's report."""
    report_problem: str = ""
    """What is wrong with the report of a stage that exited with 0."""
    pod_reason: str = ""
    pod_message: str = ""
    """Of the pod's status: what the kubelet says of the whole pod."""
    disruption_reason: str = ""
    disruption_message: str = ""
    """Of the condition DisruptionTarget."""
    unschedulable: str = ""
    """The scheduler's words in the condition PodScheduled."""
    deleted: bool = False
    """True when somebody asked for the pod's deletion before its container ended."""
    node: Node = Node.SOUND
    node_evidence: str = ""
    node_remedy: str = ""
    hang: str = ""
    """How long nothing was heard of the stage."""
    job_reason: str = ""
    job_message: str = ""
    """Of the Job's condition Failed or FailureTarget."""
    event_reason: str = ""
    event_message: str = ""
    """Of the newest warning event about the pod or its Job, where the status says nothing (mounts, refused pods)."""
    http_status: int | None = None
    """The API server's answer to the creation of a child."""
    refusal: str = ""


@dataclass(frozen=True)
class When:
    """What the evidence has to be like; each field is one of Evidence, and None is not looked at.

    A text is a regular expression that is searched for.
    """

    over: bool | None = None
    podless: bool | None = None
    exit_code: Collection[int | None] | None = None
    container_reason: str | None = None
    container_message: str | None = None
    stage_reason: str | None = None
    report_problem: str | None = None
    pod_reason: str | None = None
    pod_message: str | None = None
    disruption_reason: str | None = None
    disruption_message: str | None = None
    unschedulable: str | None = None
    deleted: bool | None = None
    node: Node | None = None
    hang: str | None = None
    job_reason: str | None = None
    event_reason: str | None = None
    event_message: str | None = None
    http_status: Collection[int] | None = None
    refusal: str | None = None

    @cached_property
    def looked_at(self) -> tuple[tuple[str, object], ...]:
        """The fields that are looked at, with what each has to be like."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return tuple((name, wanted) for name, wanted in pairs if wanted is not None)

    def matches(self, evidence: Evidence) -> bool:
        """True when the evidence is so in every field that is looked at."""
        return all(_fits(wanted, getattr(evidence, name)) for name, wanted in self.looked_at)


def _fits(wanted: object, value: object) -> bool:
    if isinstance(wanted, str):
        return isinstance(value, str) and re.search(wanted, value) is not None
    if isinstance(wanted, Collection):
        return value in wanted
    return value is wanted


class Verdict(StrEnum):
    """What follows. The values are the runbook's words in its column "tried again"."""

    FAIL = "no"
    """The same inputs end the same way: the stage fails at once."""
    COUNTED = "counted"
    """Tried again, and it uses up one of retryPolicy.maxRetries."""
    FREE = "free"
    """Tried again, and costs nothing: the infrastructure's fault."""
    WAIT = "waits"
    """Nothing has ended; it goes on by itself when the cause is gone."""


class Precedence(IntEnum):
    """Which of several pods' ends is the attempt's cause: the lowest, then the earliest."""

    OWN = 0
    """The pod says itself what is wrong with it."""
    NODE = 1
    """Explains every other end of the gang but those."""
    EVENT = 2
    ECHO = 3
    """Notices a peer's end."""


@dataclass(frozen=True)
class Rule:
    """One row: when it fits, what follows, and the message: `said` is the evidence, `remedy` what to do.

    Both are filled in from the evidence's fields by name, such as {subject}, {stage}, {words}.
    """

    when: When
    verdict: Verdict
    reason: Reason
    said: str
    remedy: str
    precedence: Precedence = Precedence.EVENT

    def message(self, evidence: Evidence) -> str:
        """Evidence and remedy as sentences."""
        values = {field.name: getattr(evidence, field.name) for field in fields(evidence)}
        said = sentence(self.said.format_map(values).strip(" :"))
        return f"{said} {self.remedy.format_map(values)}".strip()


def sentence(text: str) -> str:
    """The text with a full stop where it has no end of its own."""
    text = text.strip()
    return text if not text or text.endswith((".", "!", "?", "…")) else f"{text}."


_FROM_CHECKPOINT = "The next attempt goes on from the last checkpoint."
_ELSEWHERE = "The next attempt goes on from the last checkpoint, on other nodes where there are any."
_DISRUPTED = "{subject} was stopped ({disruption_reason}): {disruption_message}"
_STATUS = "{subject} failed ({pod_reason}): {pod_message}"
_CONTAINER = "{subject}: {words}"
_STUCK = "{subject} cannot start ({container_reason}): {container_message}"
_EVENT = "{subject} cannot start ({event_reason}): {event_message}"
_REFUSED = "{subject} cannot be created: {refusal}"
_STOPPED_CODES = frozenset({ExitCode.INTERRUPTED, 137, 143})
"""A container that ends so after its pod was deleted was stopped by that."""

RULES: tuple[Rule, ...] = (
    # The stage found fault with what it was given: true on every node, whatever else happened to the pod.
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.USER_ERROR})),
        Verdict.FAIL,
        Reason.USER_ERROR,
        _CONTAINER,
        "Correct the spec; if it was the data, suspend and resume the job after that.",
        Precedence.OWN,
    ),
    Rule(
        When(over=True, container_reason="^OOMKilled$"),
        Verdict.COUNTED,
        Reason.OUT_OF_HOST_MEMORY,
        "{subject} was killed for using more memory than its limit or its node has (OOMKilled)",
        "If it repeats, raise stages.{stage}.resources.limits.memory.",
        Precedence.OWN,
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.OUT_OF_HOST_MEMORY})),
        Verdict.COUNTED,
        Reason.OUT_OF_HOST_MEMORY,
        _CONTAINER,
        "If it repeats, raise stages.{stage}.resources.limits.memory.",
        Precedence.OWN,
    ),
    # The node. Before damaged artifacts and device memory: a faulty machine is a cause of both, and on a sound one the
    # next attempt finds out. After host memory: a stage that takes too much can silence its node, again and again.
    Rule(
        When(over=True, node=Node.LOST),
        Verdict.FREE,
        Reason.NODE_LOST,
        "{subject}: {node_evidence}",
        "{node_remedy}",
        Precedence.NODE,
    ),
    Rule(
        When(over=True, node=Node.FAULTY),
        Verdict.FREE,
        Reason.NODE_FAULT,
        "{subject}: {node_evidence}",
        "{node_remedy}",
        Precedence.NODE,
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.CORRUPT_ARTIFACT})),
        Verdict.FAIL,
        Reason.CORRUPT_ARTIFACT,
        _CONTAINER,
        "Remove the named folder from the workspace volume, then suspend and resume the job.",
        Precedence.OWN,
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.OUT_OF_DEVICE_MEMORY})),
        Verdict.FAIL,
        Reason.OUT_OF_DEVICE_MEMORY,
        _CONTAINER,
        "Lower training.microBatchSize or dataset.maxLength, or split the model further.",
        Precedence.OWN,
    ),
    # The attempt's time.
    Rule(
        When(over=True, job_reason="^DeadlineExceeded$"),
        Verdict.COUNTED,
        Reason.STAGE_DEADLINE_EXCEEDED,
        "{subject} was stopped at the deadline of stage {stage}: {job_message}",
        "The next attempt goes on from the last checkpoint; if it repeats, raise stages.{stage}.activeDeadlineSeconds.",
    ),
    Rule(
        When(over=True, pod_reason="^DeadlineExceeded$"),
        Verdict.COUNTED,
        Reason.STAGE_DEADLINE_EXCEEDED,
        _STATUS,
        "The next attempt goes on from the last checkpoint; if it repeats, raise stages.{stage}.activeDeadlineSeconds.",
    ),
    Rule(
        When(over=True, hang="."),
        Verdict.COUNTED,
        Reason.HANGING,
        "{subject} hangs: {hang}",
        "It was stopped, and the next attempt goes on from the last checkpoint. Its last words are in the stage's log; "
        "if it was only slow, raise stages.{stage}.hangSeconds.",
    ),
    # The cluster took the pod away, and said so in its condition DisruptionTarget.
    Rule(
        When(over=True, disruption_reason="^PreemptionByScheduler$"),
        Verdict.FREE,
        Reason.PREEMPTED,
        _DISRUPTED,
        "It goes on from the last checkpoint when there is room.",
    ),
    Rule(
        When(over=True, disruption_reason="^TerminationByKubelet$", disruption_message="critical pod"),
        Verdict.FREE,
        Reason.PREEMPTED,
        _DISRUPTED,
        "It goes on from the last checkpoint when there is room.",
    ),
    Rule(
        When(over=True, disruption_reason="^TerminationByKubelet$", disruption_message="(?i)shut(ting )?down"),
        Verdict.FREE,
        Reason.NODE_LOST,
        _DISRUPTED,
        _ELSEWHERE,
        Precedence.NODE,
    ),
    Rule(
        When(over=True, disruption_reason="^DeletionBy(TaintManager|PodGC)$"),
        Verdict.FREE,
        Reason.NODE_LOST,
        _DISRUPTED,
        _ELSEWHERE,
        Precedence.NODE,
    ),
    Rule(
        When(over=True, disruption_reason="."),
        Verdict.FREE,
        Reason.EVICTED,
        _DISRUPTED,
        _FROM_CHECKPOINT,
    ),
    # The kubelet's words about the whole pod.
    Rule(
        When(over=True, pod_reason="^Evicted$", pod_message="(?i)exceed"),
        Verdict.COUNTED,
        Reason.EVICTED,
        _STATUS,
        "Raise the ephemeral-storage limit of stages.{stage}.resources.",
        Precedence.OWN,
    ),
    Rule(When(over=True, pod_reason="^Evicted$"), Verdict.FREE, Reason.EVICTED, _STATUS, _FROM_CHECKPOINT),
    Rule(
        When(over=True, pod_reason="^Preempting$"),
        Verdict.FREE,
        Reason.PREEMPTED,
        _STATUS,
        "It goes on from the last checkpoint when there is room.",
    ),
    Rule(
        When(over=True, pod_reason="^(Terminated|NodeShutdown|NodeLost)$"),
        Verdict.FREE,
        Reason.NODE_LOST,
        _STATUS,
        _ELSEWHERE,
        Precedence.NODE,
    ),
    Rule(
        When(over=True, pod_reason="^UnexpectedAdmissionError$"),
        Verdict.FREE,
        Reason.NODE_REFUSED,
        _STATUS,
        "It is tried again; if one node does it again and again, its device plugin has fewer devices than the node "
        "says: cordon that node.",
    ),
    Rule(
        When(over=True, pod_reason="^(OutOf|Node(Affinity|Name|Ports|Unschedulable)|.*(Topology|SMT|Affinity|Admi))"),
        Verdict.FREE,
        Reason.NODE_REFUSED,
        _STATUS,
        "The node changed between the scheduler's choice and the pod's start; it is tried again.",
    ),
    Rule(
        When(over=True, pod_reason="."),
        Verdict.FREE,
        Reason.POD_FAILED,
        _STATUS,
        "It is tried again; kubectl describe pod has more.",
    ),
    # The container's end.
    Rule(
        When(over=True, container_reason="^ContainerStatusUnknown$"),
        Verdict.FREE,
        Reason.NODE_LOST,
        "{subject}: the kubelet lost sight of the container (its node restarted)",
        _FROM_CHECKPOINT,
        Precedence.NODE,
    ),
    Rule(
        When(over=True, deleted=True, exit_code=_STOPPED_CODES),
        Verdict.FREE,
        Reason.POD_DELETED,
        "{subject} was deleted and stopped with code {exit_code}",
        _FROM_CHECKPOINT,
    ),
    Rule(
        When(over=True, deleted=True, stage_reason="^Terminated$"),
        Verdict.FREE,
        Reason.POD_DELETED,
        "{subject} was deleted and stopped with code {exit_code}",
        _FROM_CHECKPOINT,
    ),
    Rule(
        When(over=True, podless=True),
        Verdict.FREE,
        Reason.POD_DELETED,
        "A pod of {subject} went away before its end was seen ({job_reason}: {job_message})",
        _FROM_CHECKPOINT,
    ),
    Rule(
        When(over=True, exit_code=frozenset({None})),
        Verdict.FREE,
        Reason.POD_DELETED,
        "{subject} went away before its container ended",
        _FROM_CHECKPOINT,
    ),
    Rule(
        When(over=True, container_reason="^(StartError|ContainerCannotRun)$"),
        Verdict.COUNTED,
        Reason.CONTAINER_CONFIG_ERROR,
        "{subject} could not start its container ({container_reason}): {container_message}",
        "Check that the image of stages.{stage} is the trainer of this release, and the node's container runtime.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({126, 127, 128})),
        Verdict.COUNTED,
        Reason.CONTAINER_CONFIG_ERROR,
        _CONTAINER,
        "The image has no such program: check that the image of stages.{stage} is the trainer of this release.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({0}), report_problem="."),
        Verdict.COUNTED,
        Reason.REPORT_MISSING,
        "{subject} exited with code 0, but {report_problem}",
        "Check that stages.{stage}.image is the trainer of this release.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.RETRYABLE}), stage_reason="^(PeerLost|CollectiveTimeout)$"),
        Verdict.COUNTED,
        Reason.COLLECTIVE_TIMEOUT,
        _CONTAINER,
        "It is tried again; if it repeats, look at the network between the nodes of the job.",
        Precedence.ECHO,
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.RETRYABLE}), stage_reason="^Terminated$"),
        Verdict.FREE,
        Reason.INTERRUPTED,
        _CONTAINER,
        _FROM_CHECKPOINT,
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.RETRYABLE})),
        Verdict.COUNTED,
        Reason.RETRYABLE_ERROR,
        _CONTAINER,
        "It is tried again.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({ExitCode.INTERRUPTED})),
        Verdict.FREE,
        Reason.INTERRUPTED,
        _CONTAINER,
        "The next attempt goes on from there.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({137, 143})),
        Verdict.COUNTED,
        Reason.KILLED,
        _CONTAINER,
        "Nothing says who killed it: not the kernel for memory, and nobody deleted the pod. It is tried again; if it "
        "repeats, look at the node's kernel log and at agents that kill processes.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({135})),
        Verdict.COUNTED,
        Reason.CRASHED,
        _CONTAINER,
        "SIGBUS: shared memory or a file mapped from the volume went away. It is tried again; if it repeats, check the "
        "free space of the volume and of the node.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({132})),
        Verdict.COUNTED,
        Reason.CRASHED,
        _CONTAINER,
        "SIGILL: the image was built for another processor than the node has; choose nodes by stages.{stage}."
        "nodeSelector.",
    ),
    Rule(
        When(over=True, exit_code=frozenset({131, 133, 134, 136, 139})),
        Verdict.COUNTED,
        Reason.CRASHED,
        _CONTAINER,
        "A native library, a driver or the machine. It is tried again; if it repeats on one node, have that node "
        "checked, otherwise report it with the log.",
    ),
    Rule(
        When(over=True),
        Verdict.COUNTED,
        Reason.UNEXPECTED_ERROR,
        _CONTAINER,
        "It is tried again; if it repeats, read the log of the pod and report it.",
    ),
    # What does not start. The scheduler:
    Rule(
        When(unschedulable='persistentvolumeclaim ".*" (not found|is being deleted)'),
        Verdict.WAIT,
        Reason.CLAIM_MISSING,
        "{subject} has no node: {unschedulable}",
        "Create the claim, or correct spec.workspace.claimName (suspend the job first).",
    ),
    Rule(
        When(unschedulable="PersistentVolumeClaim"),
        Verdict.WAIT,
        Reason.CLAIM_NOT_BOUND,
        "{subject} has no node: {unschedulable}",
        "kubectl describe pvc says what its volume waits for.",
    ),
    Rule(
        When(unschedulable="."),
        Verdict.WAIT,
        Reason.UNSCHEDULABLE,
        "{subject} has no node: {unschedulable}",
        "It starts as soon as a node fits: add nodes, or change resources, nodeSelector or tolerations of "
        "stages.{stage}.",
    ),
    # The kubelet, in the container's waiting state:
    Rule(
        When(over=False, container_reason="^(ErrImage|Image|InvalidImageName|RegistryUnavailable|SignatureValidation)"),
        Verdict.WAIT,
        Reason.IMAGE_PULL_FAILED,
        _STUCK,
        "Correct images.trainer of the chart or stages.{stage}.image, or its pull secrets.",
    ),
    Rule(
        When(
            over=False,
            container_reason="^CreateContainerConfigError$",
            container_message=r"(?i)secret.* not found|couldn't find key",
        ),
        Verdict.WAIT,
        Reason.SECRET_MISSING,
        _STUCK,
        "Create the Secret with that key; the pod starts by itself then.",
    ),
    Rule(
        When(over=False, container_reason="^(CreateContainer|RunContainer|PostStart|PreCreate|PreStart|CrashLoop)"),
        Verdict.WAIT,
        Reason.CONTAINER_CONFIG_ERROR,
        _STUCK,
        "Most often the image is not the trainer of this release, or the node's runtime is broken: kubectl describe "
        "pod has more.",
    ),
    # Events, where no status says it:
    Rule(
        When(event_reason="^FailedMount$", event_message="(?i)secret.* not found|non-?existent secret key"),
        Verdict.WAIT,
        Reason.SECRET_MISSING,
        _EVENT,
        "Create the Secret with that key; the pod starts by itself then.",
    ),
    Rule(
        When(event_reason="^(FailedMount|FailedAttachVolume|FailedMapVolume)$"),
        Verdict.WAIT,
        Reason.MOUNT_FAILED,
        _EVENT,
        "Check the storage driver's pods on that node, and that the node can reach the file system.",
    ),
    Rule(
        When(event_reason="^FailedCreatePodSandBox$"),
        Verdict.WAIT,
        Reason.CONTAINER_CONFIG_ERROR,
        _EVENT,
        "The node's network plugin or container runtime is broken: look at the node.",
    ),
    Rule(
        When(event_reason="^FailedCreate$", event_message="exceeded quota"),
        Verdict.WAIT,
        Reason.QUOTA_EXCEEDED,
        _EVENT,
        "Raise the quota of the namespace or free what uses it; the pods are created by themselves then.",
    ),
    Rule(
        When(event_reason="^FailedCreate$"),
        Verdict.WAIT,
        Reason.CHILD_REFUSED,
        _EVENT,
        "Correct stages.{stage} or the chart's defaults for the stage, or let the namespace's policies admit it.",
    ),
    # The API server's refusal of a child:
    Rule(
        When(http_status=frozenset({409})),
        Verdict.WAIT,
        Reason.NAME_CONFLICT,
        _REFUSED,
        "Remove the object of that name, or name the job differently.",
    ),
    Rule(
        When(http_status=frozenset({403}), refusal="exceeded quota"),
        Verdict.WAIT,
        Reason.QUOTA_EXCEEDED,
        _REFUSED,
        "Raise the quota of the namespace or free what uses it; it is tried again.",
    ),
    Rule(
        When(http_status=frozenset({500, 503}), refusal="failed calling webhook"),
        Verdict.WAIT,
        Reason.CHILD_REFUSED,
        _REFUSED,
        "The named webhook's service does not answer: look at its pods; it is tried again.",
    ),
    Rule(
        When(http_status=frozenset({400, 403, 422})),
        Verdict.WAIT,
        Reason.CHILD_REFUSED,
        _REFUSED,
        "Correct stages.{stage} or the chart's defaults for the stage, or let the namespace's policies admit it; it is "
        "tried again.",
    ),
)
"""Every row, in the order in which they are tried."""

JUDGED = frozenset(rule.reason for rule in RULES)
"""Every reason that the table can give."""


def find_rule(evidence: Evidence) -> Rule | None:
    """The first row that fits; None when nothing has ended and nothing is in the way."""
    return next((rule for rule in RULES if rule.when.matches(evidence)), None)
