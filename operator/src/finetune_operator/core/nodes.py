"""Kubernetes nodes: what is known of one, whether it has a fault, and which of them an attempt's pods keep off.

core/cache.py parses every Node once, when the watch delivers it. The failure doctor and desired.py ask find_fault about
the nodes of running pods, stages.py asks nodes_to_avoid what the job's earlier attempts taught, and pods.py puts
node_affinity into the pod template. Nothing here knows HyperPod but by the names below: a cluster without those labels
gets no rule from them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.api.constants import Reason
from finetune_operator.core.times import UTC, format_time, parse_time

Raw = Mapping[str, Any]

# SageMaker HyperPod, "Resilience-related Kubernetes labels by SageMaker HyperPod"
# (sagemaker-hyperpod-eks-resiliency-node-labels)
LABEL_HEALTH = "sagemaker.amazonaws.com/node-health-status"
HEALTHY = "Schedulable"
UNHEALTHY_PREFIX = "Unschedulable"
"""Unschedulable (a deep health check runs), UnschedulablePendingReplacement, UnschedulablePendingReboot."""
LABEL_DEEP_CHECK = "sagemaker.amazonaws.com/deep-health-check-status"
DEEP_CHECK_PASSED = "Passed"
# SageMaker HyperPod, "Health Monitoring System", fault detection (…-eks-resiliency-health-monitoring-agent). The page
# on labels calls the two labels fault-type and fault-reason; what the agent writes has the plural.
LABEL_FAULT_TYPES = "sagemaker.amazonaws.com/fault-types"
LABEL_FAULT_REASONS = "sagemaker.amazonaws.com/fault-reasons"
ANNOTATION_FAULT_DETAILS = "sagemaker.amazonaws.com/fault-details"
"""JSON array of {timestamp, type, reason, message}."""
TAINT_HEALTH = LABEL_HEALTH
"""Key of the taint (value Unschedulable, effect NoSchedule) that the agent sets with the label."""

# Kubernetes, "Well-Known Labels, Annotations and Taints"
LABEL_INSTANCE_TYPE = "node.kubernetes.io/instance-type"
"""On HyperPod with the prefix of SageMaker (ml.trn1.32xlarge), elsewhere on AWS without (trn1.32xlarge)."""

MAX_WORDS = 300
"""Characters kept of a fault's message, which other software writes."""
MAX_WORD = 120
"""Characters kept of a fault's type, reason and timestamp."""
MAX_DETAILS = 262_144
"""Characters of the annotation that are read: Kubernetes allows 256 KiB for all annotations of an object."""


@dataclass(frozen=True)
class FaultDetails:
    """The newest fault that HyperPod recorded on a node, in its own words, cut to bounds. Empty where it says nothing.

    It stays on the node after a recovery, so it is evidence for a fault and never a fault by itself.
    """

    type: str = ""
    reason: str = ""
    message: str = ""
    timestamp: str = ""

    def words(self) -> str:
        """`type/reason at timestamp: message`, as much of it as is known; empty for nothing."""
        head = "/".join(word for word in (self.type, self.reason) if word)
        if self.timestamp:
            head = f"{head} at {self.timestamp}".strip()
        return ": ".join(part for part in (head, self.message) if part)


@dataclass(frozen=True)
class NodeState:
    """What decisions need of one Node. `health` and `deep_check` are None where the node has no such label."""

    name: str
    health: str | None = None
    deep_check: str | None = None
    health_taint: str = ""
    """`value:effect` of HyperPod's taint, empty without one."""
    fault: FaultDetails = FaultDetails()
    ready: str = ""
    """Status of the Ready condition: True, False or Unknown; empty before the kubelet has posted one."""
    ready_since: datetime | None = None
    ready_message: str = ""
    unschedulable: bool = False
    """Cordoned by somebody: running pods stay, so this alone is no fault."""
    deleting: bool = False
    instance_type: str = ""
    cpu: str = ""
    memory: str = ""
    """Allocatable cpu and memory, as Kubernetes quantities."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """Allocatable extended resources by name: those with a domain, such as aws.amazon.com/neuron. Counts."""


@dataclass(frozen=True)
class NodeFault:
    """Why an attempt with a pod on the node has to end. `evidence` is a phrase that follows "Pod x on node y: "."""

    reason: Reason
    evidence: str
    remedy: str
    is_dead: bool
    """True when nobody on the node would carry out a deletion: its pods have to be deleted with force."""

    @property
    def message(self) -> str:
        """Evidence and remedy as sentences."""
        return f"{self.evidence}. {self.remedy}"


def parse_node(raw: Raw) -> NodeState:
    """The NodeState of a core/v1 Node. Tolerates whatever other software has written into labels and annotations."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    allocatable = status.get("allocatable") or {}
    ready: Raw = next((each for each in status.get("conditions") or () if each.get("type") == "Ready"), {})
    return NodeState(
        name=metadata["name"],
        health=labels.get(LABEL_HEALTH),
        deep_check=labels.get(LABEL_DEEP_CHECK),
        health_taint=_find_health_taint(spec.get("taints") or ()),
        fault=_parse_fault(labels, annotations.get(ANNOTATION_FAULT_DETAILS)),
        ready=ready.get("status") or "",
        ready_since=parse_time(ready.get("lastTransitionTime")),
        ready_message=_cut(ready.get("message"), MAX_WORDS),
        unschedulable=bool(spec.get("unschedulable")),
        deleting=bool(metadata.get("deletionTimestamp")),
        instance_type=labels.get(LABEL_INSTANCE_TYPE, ""),
        cpu=str(allocatable.get("cpu", "")),
        memory=str(allocatable.get("memory", "")),
        devices={
            name: int(count)
            for name, count in sorted(allocatable.items())
            if "/" in name and str(count).isdecimal() and str(count).isascii()
        },
    )


def _find_health_taint(taints: Iterable[Raw]) -> str:
    for taint in taints:
        if taint.get("key") == TAINT_HEALTH and taint.get("value") != HEALTHY:
            return f"{taint.get('value') or ''}:{taint.get('effect') or ''}"
    return ""


def _parse_fault(labels: Raw, details: object) -> FaultDetails:
    newest = _find_newest_details(details)
    return FaultDetails(
        type=_cut(newest.get("type") or labels.get(LABEL_FAULT_TYPES), MAX_WORD),
        reason=_cut(newest.get("reason") or labels.get(LABEL_FAULT_REASONS), MAX_WORD),
        message=_cut(newest.get("message"), MAX_WORDS),
        timestamp=_cut(newest.get("timestamp"), MAX_WORD),
    )


def _find_newest_details(details: object) -> Raw:
    """The array's entry with the latest timestamp, the last one where timestamps say nothing; {} for anything else."""
    if not isinstance(details, str) or len(details) > MAX_DETAILS:
        return {}
    try:
        entries = json.loads(details)
    except (ValueError, RecursionError):
        return {}
    if isinstance(entries, Mapping):
        entries = [entries]
    if not isinstance(entries, list):
        return {}
    known = [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, Mapping)]
    if not known:
        return {}
    return max(known, key=lambda pair: (_moment(pair[1].get("timestamp")), pair[0]))[1]


def _moment(text: object) -> datetime:
    try:
        moment = parse_time(text) if isinstance(text, str) else None
    except ValueError:
        moment = None
    if moment is None:
        return datetime.min.replace(tzinfo=UTC)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _cut(value: object, limit: int) -> str:
    """One line of text of at most `limit` characters; empty for None."""
    if value is None:
        return ""
    line = " ".join(str(value)[: 2 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


_HYPERPOD_ACTS = "The next attempt keeps off it and goes on from the last checkpoint."
_REMEDIES: Mapping[str, str] = {
    "UnschedulablePendingReplacement": "HyperPod replaces the node by itself where automatic node recovery is on; else "
    f"run `aws sagemaker batch-replace-cluster-nodes`. {_HYPERPOD_ACTS}",
    "UnschedulablePendingReboot": "HyperPod reboots the node by itself where automatic node recovery is on; else run "
    f"`aws sagemaker batch-reboot-cluster-nodes`. {_HYPERPOD_ACTS}",
    "Unschedulable": "HyperPod is checking the node and gives it back when it passes. "
    "The next attempt goes on from the last checkpoint.",
}
"""By value of the health label."""
_OTHER_HEALTH = f"Look at the node with `kubectl describe node`. {_HYPERPOD_ACTS}"
_LOST = "The next attempt goes on from the last checkpoint, on other nodes where there are any."


def find_fault(node: NodeState | None, *, deleted: bool = False) -> NodeFault | None:
    """Why pods must not stay on a node, or None. `deleted`: its object is gone from the API server; node may be None.

    A node that was never seen (None, not deleted) has no known fault: nodes may not be watched. A cordoned one has none
    either. HyperPod's word comes before the kubelet's silence, which it often explains.
    """
    if deleted:
        fault = node.fault.words() if node is not None else ""
        return NodeFault(Reason.NODE_LOST, "the node was deleted from the cluster" + _because(fault), _LOST, True)
    if node is None:
        return None
    is_dead = node.ready == "Unknown"
    because = _because(node.fault.words())
    silent = " and its kubelet does not answer" if is_dead else ""
    if node.health is not None and node.health.startswith(UNHEALTHY_PREFIX):
        evidence = f"HyperPod labelled the node {node.health}{because}{silent}"
        return NodeFault(Reason.NODE_FAULT, evidence, _REMEDIES.get(node.health, _OTHER_HEALTH), is_dead)
    if node.health_taint:
        evidence = f"HyperPod tainted the node {TAINT_HEALTH}={node.health_taint}{because}{silent}"
        return NodeFault(Reason.NODE_FAULT, evidence, _OTHER_HEALTH, is_dead)
    if node.deleting:
        return NodeFault(Reason.NODE_LOST, f"the node is being deleted from the cluster{because}", _LOST, is_dead)
    if node.ready in ("False", "Unknown"):
        since = f" since {format_time(node.ready_since)}" if node.ready_since else ""
        what = "the node is not ready" if node.ready == "False" else "the node does not answer"
        words = _because(node.ready_message.rstrip(". ") or node.fault.words())
        return NodeFault(Reason.NODE_LOST, f"{what}{since}{words}", _LOST, is_dead)
    return None


MOST_NAMED = 3
"""Nodes that a message names."""


def held_back(nodes: Iterable[NodeState]) -> str:
    """Which nodes HyperPod keeps pods off, as a sentence for those who wait for one; empty where there are none."""
    marks = {
        node.name: f"tainted {node.health_taint}" if node.health in (None, HEALTHY) else node.health
        for node in nodes
        if (fault := find_fault(node)) is not None and fault.reason is Reason.NODE_FAULT
    }
    if not marks:
        return ""
    named = ", ".join(f"{name} ({marks[name]})" for name in sorted(marks)[:MOST_NAMED])
    more = f" and {len(marks) - MOST_NAMED} more" if len(marks) > MOST_NAMED else ""
    noun = "node" if len(marks) == 1 else "nodes"
    return (
        f"HyperPod keeps pods off {noun} {named}{more}; `kubectl get nodes -L {LABEL_HEALTH}` shows when it gives them "
        "back."
    )


def _because(words: str) -> str:
    return f" ({words})" if words else ""


@dataclass(frozen=True)
class Avoidance:
    """Nodes that new attempts keep off (`avoid`) or take last (`suspects`), by name, sorted.

    `ends_at` is when the first of `avoid` may be used again; None when none is avoided.
    """

    avoid: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    ends_at: datetime | None = None


def nodes_to_avoid(
    faults: Iterable[tuple[str, datetime]], now: datetime, *, window_seconds: float, faults_to_avoid: int
) -> Avoidance:
    """What faults of attempts, each a node's name and its moment, mean for the next attempt.

    A node is remembered for window_seconds after its last fault; it is avoided when at least faults_to_avoid (1 or
    more) lie within window_seconds up to that last one, and a suspect with fewer.
    """
    window = timedelta(seconds=window_seconds)
    moments: dict[str, list[datetime]] = defaultdict(list)
    for node, at in faults:
        moments[node].append(at)
    avoid: dict[str, datetime] = {}
    suspects: list[str] = []
    for node, known in moments.items():
        last = max(known)
        if now >= last + window:
            continue
        if sum(last - at < window for at in known) >= faults_to_avoid:
            avoid[node] = last + window
        else:
            suspects.append(node)
    return Avoidance(tuple(sorted(avoid)), tuple(sorted(suspects)), min(avoid.values(), default=None))


def node_affinity(
    nodes: Iterable[NodeState],
    *,
    avoid: Collection[str] = (),
    suspects: Collection[str] = (),
    needed: int = 1,
    instance_type: str | None = None,
) -> dict[str, Any] | None:
    """The pod's `affinity.nodeAffinity`, or None when there is nothing to ask for. The same for any order of arguments.

    Healthy nodes are required only where some node carries HyperPod's label, checked ones preferred likewise. Avoided
    nodes are forbidden only where the attempt has room without them: at least `needed` other nodes (of `instance_type`,
    if given) that can take pods. Else they are only taken last, for an attempt's pods keep their affinity, and on a
    cluster without spare nodes they would wait for ever. What is faulty now is kept free of pods by label or taint.

    Nodes are named by metadata.name, for a host name label need not equal it. Everything required stands in one term,
    whose requirements all have to hold; and the API server takes exactly one value a matchFields requirement.
    """
    known = list(nodes)
    labelled = any(node.health is not None for node in known)
    room = [
        node
        for node in known
        if node.name not in avoid
        and (instance_type is None or node.instance_type == instance_type)
        and (not labelled or node.health == HEALTHY)
        and not node.unschedulable
        and find_fault(node) is None
    ]
    forbidden, last = (set(avoid), set[str]()) if len(room) >= needed else (set[str](), set(avoid))
    term: dict[str, Any] = {}
    if labelled:
        term["matchExpressions"] = [{"key": LABEL_HEALTH, "operator": "In", "values": [HEALTHY]}]
    if forbidden:
        term["matchFields"] = _not_named(forbidden)
    preferences: list[dict[str, Any]] = []
    if any(node.deep_check is not None for node in known):
        checked = {"key": LABEL_DEEP_CHECK, "operator": "In", "values": [DEEP_CHECK_PASSED]}
        preferences.append({"matchExpressions": [checked]})
    if doubtful := (set(suspects) | last) - forbidden:
        preferences.append({"matchFields": _not_named(doubtful)})
    if last:
        preferences.append({"matchFields": _not_named(last)})
    affinity: dict[str, Any] = {}
    if term:
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [term]}
    if preferences:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": preference} for preference in preferences
        ]
    return affinity or None


def _not_named(names: Collection[str]) -> list[dict[str, Any]]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in sorted(set(names))]
