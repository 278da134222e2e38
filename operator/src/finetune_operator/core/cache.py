"""Cache: what the watches delivered, parsed once and kept small. A pure data structure: no I/O, no clock.

handlers.py and kube/reflector.py put events in, reconcile.py takes an Observed out. Events may come twice, late, out of
order or not at all: every object carries its resourceVersion and an older one never replaces a newer one; a list says
what is gone. What we write ourselves goes in at once, from the API server's answer, so that the next round sees it
before the watch does.

resourceVersions of one kind are compared as numbers, which the API server promises since Kubernetes 1.35 and etcd gave
all along (KEP-5504, comparable resource version).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_operator.api import constants
from finetune_operator.api.finetunejob import FineTuneJob, SpecError, parse_job, parse_status
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.core.nodes import NodeState, parse_node
from finetune_operator.core.observed import (
    Attempt,
    AttemptKey,
    Observed,
    Pod,
    StageJob,
    find_attempt_key,
    group_attempts,
    parse_pod,
    parse_stage_job,
)
from finetune_operator.core.queueing import Workload, parse_workload

Raw = Mapping[str, Any]

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

JOB, POD, SERVICE, NODE, WORKLOAD = "Job", "Pod", "Service", "Node", "Workload"
MOST_TOMBSTONES = 10_000


@dataclass(frozen=True)
class Wake:
    """A FineTuneJob that an event concerns. Not urgent: it changes what is shown and not what is to be done."""

    key: Key
    urgent: bool = True


@dataclass(frozen=True)
class CachedJob:
    """One FineTuneJob: parsed, or what is wrong with it. `status` is the newest known, our own writes included."""

    namespace: str
    name: str
    uid: str
    generation: int
    version: int
    deleting: bool
    status: FineTuneJobStatus
    job: FineTuneJob | None = None
    error: SpecError | None = None

    @property
    def key(self) -> Key:
        return (self.namespace, self.name)


@dataclass(frozen=True)
class _Child:
    """One Job, Pod or Service of a FineTuneJob."""

    version: int
    key: Key
    owner: str
    attempt: AttemptKey
    name: str
    value: StageJob | Pod | None


@dataclass
class _Children:
    """The children of one FineTuneJob by kind and uid, and the attempts that they make up, until something changes."""

    by_kind: dict[str, dict[str, _Child]] = field(default_factory=lambda: {JOB: {}, POD: {}, SERVICE: {}})
    observed: Observed | None = None

    def is_empty(self) -> bool:
        return not any(self.by_kind.values())


def version_of(raw: Raw) -> int:
    """The object's resourceVersion as a number."""
    return int(raw["metadata"].get("resourceVersion") or 0)


class Cache:
    """See the module. Kinds are JOB, POD, SERVICE, NODE and WORKLOAD; FineTuneJobs have methods of their own."""

    def __init__(self) -> None:
        self._jobs: dict[Key, CachedJob] = {}
        self._children: dict[str, _Children] = {}
        self._where: dict[tuple[str, str], str] = {}
        """(kind, uid of a child) -> uid of its FineTuneJob."""
        self._pods: dict[Key, str] = {}
        """Namespace and name of a pod -> its uid."""
        self._gone: dict[str, int] = {}
        """uid -> resourceVersion of objects that were deleted: a late event must not bring them back."""
        self.nodes: dict[str, NodeState] = {}
        self._node_versions: dict[str, int] = {}
        self._deleted_nodes: set[str] = set()
        self._workloads: dict[str, tuple[int, str, Workload]] = {}
        """By uid: resourceVersion, namespace, value."""
        self._workload_of: dict[str, str] = {}
        self.kueue_installed = False

    # FineTuneJobs

    def put_job(self, raw: Raw) -> Wake | None:
        """A FineTuneJob as a watch or list has it. None for what is known already, our own status writes above all."""
        metadata = raw["metadata"]
        key, version, uid = (metadata.get("namespace") or "default", metadata["name"]), version_of(raw), metadata["uid"]
        known = self._jobs.get(key)
        if uid in self._gone or (known is not None and known.uid == uid and version <= known.version):
            return None
        self._jobs[key] = _parse_cached_job(raw, key, version, known)
        return Wake(key)

    def remove_job(self, key: Key, uid: str) -> Wake | None:
        """The FineTuneJob was deleted. Its children stay until their own deletions are seen."""
        known = self._jobs.get(key)
        self._bury(uid, known.version if known is not None else 0)
        if known is None or known.uid != uid:
            return None
        del self._jobs[key]
        return Wake(key)

    def keep_jobs(self, present: Mapping[Key, str], list_version: int, *, namespace: str = "") -> list[Wake]:
        """After a list: forget the jobs that are not in `present` (key -> uid) and not newer than the list."""
        lost = [
            job
            for job in self._jobs.values()
            if present.get(job.key) != job.uid and job.version <= list_version and namespace in ("", job.namespace)
        ]
        return [wake for job in lost if (wake := self.remove_job(job.key, job.uid)) is not None]

    def wrote_status(self, raw: Raw, status: FineTuneJobStatus) -> None:
        """Our own status write, before its event comes. `raw` is the API server's answer to it.

        Where the spec was changed just before, the events of both are still to come, and must not look known.
        """
        metadata, version = raw["metadata"], version_of(raw)
        key = (metadata.get("namespace") or "default", metadata["name"])
        known = self._jobs.get(key)
        if known is not None and known.uid == metadata["uid"] and version > known.version:
            job = known.job.model_copy(update={"status": status}) if known.job is not None else None
            is_same = (metadata.get("generation") or 0) == known.generation
            self._jobs[key] = replace(known, version=version if is_same else known.version, status=status, job=job)

    def find_job(self, key: Key) -> CachedJob | None:
        return self._jobs.get(key)

    def jobs(self) -> Iterable[CachedJob]:
        return self._jobs.values()

    # children, nodes, workloads

    def put(self, kind: str, raw: Raw) -> list[Wake]:
        """An object as a watch, a list or an answer to our own write has it."""
        if kind == NODE:
            return self._put_node(raw)
        if kind == WORKLOAD:
            return self._put_workload(raw)
        return self._put_child(kind, raw)

    def remove(self, kind: str, raw: Raw) -> list[Wake]:
        """The object was deleted; `raw` is its last state."""
        metadata = raw["metadata"]
        self._bury(metadata.get("uid") or "", version_of(raw))
        if kind == NODE:
            return self._remove_node(metadata["name"])
        if kind == WORKLOAD:
            return self._remove_workload(metadata["uid"])
        return self._remove_child(kind, metadata["uid"])

    def replace_all(self, kind: str, raws: Iterable[Raw], list_version: int, *, namespace: str = "") -> list[Wake]:
        """A whole list of a kind (in one namespace, where one is given).

        What it lacks is gone, but for what was written after it was made.
        """
        present: set[str] = set()
        wakes: list[Wake] = []
        for raw in raws:
            present.add(raw["metadata"]["name"] if kind == NODE else raw["metadata"]["uid"])
            wakes.extend(self.put(kind, raw))
        for lost in [
            uid for uid, version in self._known(kind, namespace) if uid not in present and version <= list_version
        ]:
            if kind == NODE:
                wakes.extend(self._remove_node(lost))
            elif kind == WORKLOAD:
                wakes.extend(self._remove_workload(lost))
            else:
                wakes.extend(self._remove_child(kind, lost))
        return wakes

    def forget_workloads(self) -> None:
        """Kueue is gone, and its Workloads with it."""
        self._workloads.clear()
        self._workload_of.clear()

    def replace_children(self, owner: str, kind: str, raws: Collection[Raw], list_version: int) -> None:
        """A fresh list of one FineTuneJob's children of a kind, read because the watches seemed behind."""
        present = {raw["metadata"]["uid"] for raw in raws}
        children = self._children.get(owner)
        known = list(children.by_kind[kind].items()) if children is not None else []
        for uid, child in known:
            if uid not in present and child.version <= list_version:
                self._remove_child(kind, uid)
        for raw in raws:
            self._put_child(kind, raw)

    def observe(self, owner: str) -> Observed:
        """What is known of the FineTuneJob with that uid."""
        children = self._children.get(owner)
        attempts: tuple[Attempt, ...] = ()
        if children is not None:
            if children.observed is None:
                children.observed = Observed(attempts=group_attempts(*_typed(children)))
            attempts = children.observed.attempts
        return Observed(
            attempts=attempts,
            nodes=self.nodes,
            deleted_nodes=frozenset(self._deleted_nodes),
            workloads=self._workloads_of(owner, attempts),
            kueue_installed=self.kueue_installed,
        )

    def find_pod(self, namespace: str, name: str) -> tuple[str, Key, AttemptKey] | None:
        """(uid, job, attempt) of a stage's pod; None for any other."""
        uid = self._pods.get((namespace, name))
        if uid is None:
            return None
        child = self._children[self._where[POD, uid]].by_kind[POD][uid]
        return uid, child.key, child.attempt

    def count_children(self) -> Mapping[str, int]:
        """Number of objects held by kind."""
        counts = {kind: sum(len(c.by_kind[kind]) for c in self._children.values()) for kind in (JOB, POD, SERVICE)}
        return {**counts, NODE: len(self.nodes), WORKLOAD: len(self._workloads)}

    # the rest is how

    def _known(self, kind: str, namespace: str) -> list[tuple[str, int]]:
        if kind == NODE:
            return list(self._node_versions.items())
        if kind == WORKLOAD:
            return [(uid, version) for uid, (version, at, _) in self._workloads.items() if namespace in ("", at)]
        return [
            (uid, child.version)
            for children in self._children.values()
            for uid, child in children.by_kind[kind].items()
            if namespace in ("", child.key[0])
        ]

    def _bury(self, uid: str, version: int) -> None:
        if len(self._gone) >= MOST_TOMBSTONES:
            for old in list(self._gone)[: MOST_TOMBSTONES // 2]:
                del self._gone[old]
        self._gone[uid] = version

    def _put_child(self, kind: str, raw: Raw) -> list[Wake]:
        metadata = raw["metadata"]
        labels, uid, version = metadata.get("labels") or {}, metadata["uid"], version_of(raw)
        owner, attempt = labels.get(constants.LABEL_JOB_UID), find_attempt_key(raw)
        if not owner or attempt is None or uid in self._gone:
            return []
        children = self._children.setdefault(owner, _Children())
        before = children.by_kind[kind].get(uid)
        if before is not None and version <= before.version:
            return []
        key = (metadata.get("namespace") or "default", labels.get(constants.LABEL_JOB_NAME, ""))
        value = _PARSERS[kind](raw)
        children.by_kind[kind][uid] = _Child(version, key, owner, attempt, metadata["name"], value)
        self._where[kind, uid] = owner
        if kind == POD:
            self._pods[key[0], metadata["name"]] = uid
        if before is not None and before.value == value and before.attempt == attempt:
            return []
        children.observed = None
        return [Wake(key, urgent=_is_urgent(before.value if before is not None else None, value))]

    def _remove_child(self, kind: str, uid: str) -> list[Wake]:
        owner = self._where.pop((kind, uid), None)
        children = self._children.get(owner) if owner is not None else None
        child = children.by_kind[kind].pop(uid, None) if children is not None else None
        if owner is None or children is None or child is None:
            return []
        self._bury(uid, child.version)
        if self._pods.get((child.key[0], child.name)) == uid:
            del self._pods[child.key[0], child.name]
        children.observed = None
        if children.is_empty():
            del self._children[owner]
        return [Wake(child.key)]

    def _put_node(self, raw: Raw) -> list[Wake]:
        name, version = raw["metadata"]["name"], version_of(raw)
        if version <= self._node_versions.get(name, -1) or raw["metadata"].get("uid") in self._gone:
            return []
        state = parse_node(raw)
        self._node_versions[name] = version
        self._deleted_nodes.discard(name)
        if self.nodes.get(name) == state:
            return []
        self.nodes[name] = state
        return self._wakes_on(name)

    def _remove_node(self, name: str) -> list[Wake]:
        self._node_versions.pop(name, None)
        if self.nodes.pop(name, None) is None:
            return []
        if len(self._deleted_nodes) >= MOST_TOMBSTONES:
            self._deleted_nodes.clear()
        self._deleted_nodes.add(name)
        return self._wakes_on(name)

    def _wakes_on(self, node: str) -> list[Wake]:
        """The jobs with a pod on that node that may still run."""
        keys = {
            child.key: None
            for children in self._children.values()
            for child in children.by_kind[POD].values()
            if isinstance(child.value, Pod) and child.value.node == node and not child.value.has_ended
        }
        return [Wake(key) for key in keys]

    def _put_workload(self, raw: Raw) -> list[Wake]:
        uid, version = raw["metadata"]["uid"], version_of(raw)
        before = self._workloads.get(uid)
        if uid in self._gone or (before is not None and version <= before[0]):
            return []
        workload = parse_workload(raw)
        self._workloads[uid] = (version, raw["metadata"].get("namespace") or "default", workload)
        if workload.owner_uid:
            self._workload_of[workload.owner_uid] = uid
        return [] if before is not None and before[2] == workload else self._wakes_of_owner(workload.owner_uid)

    def _remove_workload(self, uid: str) -> list[Wake]:
        before = self._workloads.pop(uid, None)
        if before is None:
            return []
        owner = before[2].owner_uid
        if self._workload_of.get(owner) == uid:
            del self._workload_of[owner]
        return self._wakes_of_owner(owner)

    def _wakes_of_owner(self, owner: str) -> list[Wake]:
        """The FineTuneJob that a Workload's owner is, or belongs to."""
        of = self._where.get((JOB, owner), owner)
        children = self._children.get(of)
        child = next((c for c in children.by_kind[JOB].values()), None) if children is not None else None
        if child is not None:
            return [Wake(child.key)]
        return [Wake(job.key) for job in self._jobs.values() if job.uid == of][:1]

    def _workloads_of(self, owner: str, attempts: Iterable[Any]) -> dict[str, Workload]:
        found: dict[str, Workload] = {}
        uids = [owner, *(attempt.job.uid for attempt in attempts if attempt.job is not None)]
        for uid in uids:
            workload = self._workloads.get(self._workload_of.get(uid, ""))
            if workload is not None:
                found[uid] = workload[2]
        return found


_PARSERS: Mapping[str, Callable[[Raw], StageJob | Pod | None]] = {
    JOB: parse_stage_job,
    POD: parse_pod,
    SERVICE: lambda raw: None,
}


def _typed(
    children: _Children,
) -> tuple[list[tuple[AttemptKey, StageJob]], list[tuple[AttemptKey, Pod]], list[tuple[AttemptKey, str]]]:
    of = children.by_kind
    return (
        [(c.attempt, c.value) for c in of[JOB].values() if isinstance(c.value, StageJob)],
        [(c.attempt, c.value) for c in of[POD].values() if isinstance(c.value, Pod)],
        [(c.attempt, c.name) for c in of[SERVICE].values()],
    )


def _is_urgent(before: StageJob | Pod | None, after: StageJob | Pod | None) -> bool:
    """False for the steps of an ordinary start: they change what is shown, and nothing is to be done about them."""
    if isinstance(after, Pod):
        calm = Pod(after.name, after.index, "Pending")
        return _end_of(before if isinstance(before, Pod) else calm) != _end_of(after)
    if isinstance(after, StageJob) and isinstance(before, StageJob):
        return replace(before, started_at=after.started_at, created_at=after.created_at) != after
    return True


def _end_of(pod: Pod) -> tuple[object, ...]:
    """What says that a pod ends, or is about to."""
    return (pod.has_ended, pod.has_failed, pod.terminated, pod.deletion_requested_at, pod.disruption, pod.status)


def _parse_cached_job(raw: Raw, key: Key, version: int, known: CachedJob | None) -> CachedJob:
    metadata = raw["metadata"]
    uid, generation = metadata["uid"], metadata.get("generation") or 0
    cached = CachedJob(
        namespace=key[0],
        name=key[1],
        uid=uid,
        generation=generation,
        version=version,
        deleting=bool(metadata.get("deletionTimestamp")),
        status=parse_status(raw.get("status")),
    )
    if known is not None and known.uid == uid and known.generation == generation:
        job = known.job.model_copy(update={"status": cached.status}) if known.job is not None else None
        return replace(cached, job=job, error=known.error)
    try:
        return replace(cached, job=parse_job(raw))
    except SpecError as error:
        return replace(cached, error=error)
