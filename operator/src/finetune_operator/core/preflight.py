"""Preflight: what can be known to go wrong before any pod is started, with the numbers.

check_spec holds the spec against the model's sizes and the instance, and prompts against the template; what it finds is
refused. It is called as soon as the sizes are known: before prepare for models of the table, before compile and train
for all others. check_cluster holds the stages against claim, quotas and queue; those change without the spec, so what
it finds is waited for: with reason QuotaExceedsMax where the request is above what can ever be given, QuotaExceeded
where others use it now. Pure: the facts are parsed here from objects that surroundings.py reads.

Not looked at beforehand: what a LimitRange or an admission webhook adds to a pod, and policies. What those refuse is
told by the Job controller's event (silence.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from finetune_operator.api.constants import Reason
from finetune_operator.api.finetunejob import FineTuneJob
from finetune_operator.api.problems import Problem
from finetune_operator.core.accelerators.instances import InstanceType
from finetune_operator.core.failure import Waiting
from finetune_operator.core.memory import EMBEDDINGS, GIB, OUTPUT_LAYERS, MemoryEstimate, estimate_memory
from finetune_operator.core.model_shapes import ModelShape
from finetune_operator.core.parallelism import MAX_SPLIT, Parallelism
from finetune_operator.core.quantities import format_quantity, parse_quantities
from finetune_trainer.spec_rules import nearest_sizes, template_fields

Raw = Mapping[str, Any]

FLASH_TOKENS = 2048
"""On Neuron the flash attention kernel takes rows of a multiple of so many tokens; shorter rows do without it."""

READ_WRITE_MANY = "ReadWriteMany"
READ_ONLY_MANY = "ReadOnlyMany"


# ---- the spec against model and instance


@dataclass(frozen=True)
class Findings:
    """What the checks of a spec say: why it is refused, None where it is not, and what may go wrong all the same."""

    refused: Waiting | None = None
    doubts: tuple[str, ...] = ()


def check_spec(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    *,
    pod_memory_bytes: int | None = None,
) -> tuple[Problem, ...]:
    """Every reason why this training cannot run on these devices; empty when none is known.

    `shape` None: the model's sizes are not known yet, and what needs them is left out. `pod_memory_bytes` is the memory
    limit of a training pod, what a job on CPUs has for device memory; None: it has no limit.
    """
    return tuple(_spec_problems(job, parallelism, shape, instance, pod_memory_bytes))


def spec_doubts(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    *,
    pod_memory_bytes: int | None = None,
) -> tuple[str, ...]:
    """What may go wrong but is no more than an estimate: sentences for the message of a job that is not refused."""
    if shape is None:
        return ("The model's sizes are not known yet: heads, layers and memory are checked after prepare.",)
    room = _room(job, parallelism, instance, pod_memory_bytes)
    estimate = estimate_memory(job.spec, parallelism, shape)
    if room is None or estimate.least > room.bytes or estimate.total <= room.bytes:
        return ()
    return (
        f"The training may need {_gib(estimate.total)} on {room.where}, {_gib(room.bytes)} are there "
        f"({_parts(estimate)}). If it ends with {Reason.OUT_OF_DEVICE_MEMORY} or {Reason.OUT_OF_HOST_MEMORY}, lower "
        "training.microBatchSize or dataset.maxLength.",
    )


def _spec_problems(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    pod_memory_bytes: int | None,
) -> Iterator[Problem]:
    length = job.spec.dataset.max_length
    if job.spec.accelerator.type == "neuron" and length > FLASH_TOKENS and length % FLASH_TOKENS:
        low = length // FLASH_TOKENS * FLASH_TOKENS
        yield Problem(
            "spec.dataset.maxLength",
            length,
            f"maxLength above {FLASH_TOKENS} must be a multiple of {FLASH_TOKENS} on Neuron, where the flash attention "
            f"kernel takes no other length, is {length}: use {low} or {low + FLASH_TOKENS}",
        )
    yield from _prompt_problems(job)
    if shape is None:
        return
    yield from _split_problems(parallelism, shape, instance)
    yield from _tied_problems(job, shape)
    room = _room(job, parallelism, instance, pod_memory_bytes)
    if room is not None:
        estimate = estimate_memory(job.spec, parallelism, shape)
        if estimate.least > room.bytes:
            yield Problem(room.field, _gib(room.bytes), _too_large(job, parallelism, estimate, room))


def _tied_problems(job: FineTuneJob, shape: ModelShape) -> Iterator[Problem]:
    """Modules that cannot train by themselves, because their weight is another module's too."""
    lora = job.spec.method.lora
    if lora is None or not shape.tied:
        return
    for where, names in (("targetModules", lora.target_modules), ("modulesToSave", lora.modules_to_save)):
        tied = [name for name in names if name.rpartition(".")[2] in (*EMBEDDINGS, *OUTPUT_LAYERS)]
        if tied:
            yield Problem(
                f"spec.method.lora.{where}",
                list(names),
                f"{where} names {', '.join(tied)}, and the model's embedding and output layer are one matrix (tied "
                "embeddings): trained in one place only it could not be stored in the base's layout; leave it out, or "
                "use method.type full, which trains both as one",
            )


def _prompt_problems(job: FineTuneJob) -> Iterator[Problem]:
    """Evaluation's prompts that do not fill the dataset's template: known before a training is paid for."""
    template, evaluate = job.spec.dataset.template, job.spec.evaluate
    if template is None or not evaluate.enabled:
        return
    names = list(dict.fromkeys(template_fields(template.prompt)))
    for number, prompt in enumerate(evaluate.prompts):
        given = 1 if prompt.context is None else 2
        if given != len(names):
            yield Problem(
                f"spec.evaluate.prompts[{number}]",
                given,
                f"must fill dataset.template.prompt, which has {len(names)} fields ({', '.join(names) or 'none'}), and "
                f"gives {given}: text stands for the first field, context for the second or the one called context",
            )


def _split_problems(parallelism: Parallelism, shape: ModelShape, instance: InstanceType | None) -> Iterator[Problem]:
    tp, pp = parallelism.tp_size, parallelism.pp_size
    on_trn2 = instance is not None and "trn2" in instance.name
    if reasons := list(_tensor_reasons(tp, shape, on_trn2)):
        sizes = [size for size in range(1, MAX_SPLIT + 1) if not any(_tensor_reasons(size, shape, on_trn2))]
        message = f"tensorParallelSize {tp} {', '.join(reasons)}: {_nearest(sizes, tp)}"
        yield Problem("spec.parallelism.tensorParallelSize", tp, message)
    if shape.layers % pp:
        sizes = [size for size in range(1, MAX_SPLIT + 1) if shape.layers % size == 0]
        message = f"pipelineParallelSize {pp} does not divide the model's {shape.layers} layers: {_nearest(sizes, pp)}"
        yield Problem("spec.parallelism.pipelineParallelSize", pp, message)


def _tensor_reasons(tp: int, shape: ModelShape, on_trn2: bool) -> Iterator[str]:
    """What is wrong with a tensor parallel size, as the ends of a sentence."""
    parts = {
        "attention heads": shape.heads,
        "MLP's width": shape.intermediate_size,
        "vocabulary": shape.vocab_size,
    }
    for what, size in parts.items():
        if size % tp:
            yield f"does not divide the model's {what} ({size})"
    # Fewer key and value heads than ranks are held several times each, which comes out even for a multiple only.
    copies = max(1, tp // shape.kv_heads)
    if shape.kv_heads * copies % tp:
        yield f"neither divides the model's key and value heads ({shape.kv_heads}) nor is a multiple of them"
    elif tp > shape.kv_heads and on_trn2:
        yield f"is more than the model's key and value heads ({shape.kv_heads}), whose copies train apart on trn2"


def _nearest(sizes: Sequence[int], wanted: int) -> str:
    """The sound sizes next to `wanted`, as a remedy; 1 always is one."""
    return f"use {' or '.join(map(str, nearest_sizes(sizes, wanted)))}"


@dataclass(frozen=True)
class _Room:
    """Memory of one rank, where it is, and the field that decides it."""

    bytes: float
    where: str
    field: str
    remedy: str


def _room(
    job: FineTuneJob, parallelism: Parallelism, instance: InstanceType | None, pod_memory_bytes: int | None
) -> _Room | None:
    if instance is not None and instance.core_memory_gib > 0:
        core = "NeuronCore" if instance.accelerator == "neuron" else "GPU"
        split = "raise parallelism.tensorParallelSize, " if instance.accelerator == "neuron" else ""
        remedy = f"{split}choose an instanceType with larger devices"
        where = f"each {core} of {instance.name}"
        return _Room(instance.core_memory_gib * GIB, where, "spec.accelerator.instanceType", remedy)
    if job.spec.accelerator.type == "cpu" and pod_memory_bytes is not None:
        procs = parallelism.procs_per_node
        where = "each training pod" if procs == 1 else f"each of the {procs} processes of a training pod"
        remedy = "raise stages.train.resources.limits.memory"
        return _Room(pod_memory_bytes / procs, where, "spec.stages.train.resources.limits.memory", remedy)
    return None


def _too_large(job: FineTuneJob, parallelism: Parallelism, estimate: MemoryEstimate, room: _Room) -> str:
    changes = [room.remedy]
    if estimate.states <= room.bytes:
        changes.append("lower training.microBatchSize or dataset.maxLength")
        if not job.spec.training.gradient_checkpointing:
            changes.append("set training.gradientCheckpointing to true")
    else:
        on_torch = job.spec.accelerator.type != "neuron"
        is_sharded = parallelism.strategy == "fsdp"
        if job.spec.method.type == "full":
            changes.append("train an adapter (method.type lora)")
        elif on_torch and not is_sharded and job.spec.method.quantization != "nf4":
            changes.append("hold the base in fewer bits (method.quantization nf4)")
        if on_torch and job.spec.method.quantization == "none" and parallelism.dp_size > 1:
            changes.append("take more nodes" if is_sharded else "share it between ranks (parallelism.strategy fsdp)")
        if job.spec.training.precision == "fp32":
            changes.append("set training.precision to bf16")
        changes.append("take a smaller model")
    return (
        f"the training needs at least {_gib(estimate.least)} on {room.where}, {_gib(room.bytes)} are there "
        f"({_parts(estimate)}): {', or '.join(changes)}"
    )


def _parts(estimate: MemoryEstimate) -> str:
    return ", ".join(f"{name} {value:.2f} GiB" for name, value in estimate.parts_gib().items())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


# ---- the stages against the cluster


@dataclass(frozen=True)
class PodRequests:
    """What the pods of one stage ask for together: `pods` of them, `requests` and `limits` of all pods summed."""

    stage: str
    pods: int
    requests: Mapping[str, Decimal]
    limits: Mapping[str, Decimal]
    priority_class: str | None = None


@dataclass(frozen=True)
class ClaimFacts:
    """A PersistentVolumeClaim; `phase` None when it does not exist."""

    name: str
    phase: str | None
    access_modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quota:
    """A ResourceQuota. `applies` is False where its scopes leave the stages' pods out."""

    name: str
    hard: Mapping[str, Decimal]
    used: Mapping[str, Decimal]
    scopes: tuple[Raw, ...] = ()
    """As scopeSelector.matchExpressions; those of spec.scopes have operator Exists."""


@dataclass(frozen=True)
class Flavor:
    """One ResourceFlavor in a ClusterQueue: the most of each resource that it can give; None: not bounded here."""

    name: str
    most: Mapping[str, Decimal | None]


@dataclass(frozen=True)
class ClusterQueue:
    """A ClusterQueue. Each group covers resources that a stage gets from one of the group's flavors together."""

    name: str
    groups: tuple[tuple[Flavor, ...], ...] = field(default=())


def pod_requests(stage: str, manifest: Raw) -> PodRequests:
    """What a batch/v1 Job asks for. As the API server does it, a limit without a request is the request too."""
    spec = manifest["spec"]
    pod = spec["template"]["spec"]
    requests: dict[str, Decimal] = {}
    limits: dict[str, Decimal] = {}
    for container in pod.get("containers") or ():
        resources = container.get("resources") or {}
        bounds = parse_quantities(resources.get("limits"))
        _add(limits, bounds)
        _add(requests, {**bounds, **parse_quantities(resources.get("requests"))})
    pods = spec.get("parallelism") or 1
    return PodRequests(
        stage=stage,
        pods=pods,
        requests={name: pods * value for name, value in requests.items()},
        limits={name: pods * value for name, value in limits.items()},
        priority_class=pod.get("priorityClassName"),
    )


def memory_limit(limits: Mapping[str, str]) -> int | None:
    """The memory limit of a container, in bytes, from its limits by resource; None where it has none."""
    memory = parse_quantities(limits).get("memory")
    return None if memory is None else int(memory)


def parse_claim(name: str, raw: Raw | None) -> ClaimFacts:
    """The PersistentVolumeClaim `name`; `raw` None: it does not exist."""
    if raw is None:
        return ClaimFacts(name, None)
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    # A bound claim has the modes of its volume, which may be more than it asked for.
    modes = status.get("accessModes") or spec.get("accessModes") or ()
    return ClaimFacts(name, status.get("phase") or "Pending", tuple(modes))


def parse_quota(raw: Raw) -> Quota:
    """A v1 ResourceQuota."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    scopes = [{"scopeName": scope, "operator": "Exists"} for scope in spec.get("scopes") or ()]
    scopes.extend((spec.get("scopeSelector") or {}).get("matchExpressions") or ())
    return Quota(
        name=raw["metadata"]["name"],
        hard=parse_quantities(status.get("hard") or spec.get("hard")),
        used=parse_quantities(status.get("used")),
        scopes=tuple(scopes),
    )


def parse_cluster_queue(raw: Raw) -> ClusterQueue:
    """A ClusterQueue of kueue.x-k8s.io/v1beta1 or v1beta2.

    The most that a flavor gives is its nominalQuota, and within a cohort the borrowingLimit on top; without such a
    limit the cohort's other queues decide, so it is not bounded here.
    """
    spec = raw.get("spec") or {}
    in_cohort = bool(spec.get("cohort") or spec.get("cohortName"))
    groups = []
    for group in spec.get("resourceGroups") or ():
        flavors = []
        for flavor in group.get("flavors") or ():
            most = {resource["name"]: _most(resource, in_cohort) for resource in flavor.get("resources") or ()}
            flavors.append(Flavor(flavor["name"], most))
        groups.append(tuple(flavors))
    return ClusterQueue(raw["metadata"]["name"], tuple(groups))


def check_cluster(
    job: FineTuneJob,
    due: str,
    requests: Sequence[PodRequests],
    claim: ClaimFacts,
    quotas: Iterable[Quota],
    cluster_queue: ClusterQueue | None,
) -> Waiting | None:
    """What keeps the stage `due`, or ever will keep one of `requests`, from running; None when nothing is known to.

    `requests` are those of every stage still to run, so that a training that no quota can hold is found before prepare
    runs. Only of `due` it is asked whether there is room now, and not where Kueue decides when its pods come.
    """
    quotas = list(quotas)
    found = _claim_problem(job, claim)
    for request in requests:
        found = found or _never_fits(job, request, quotas)
        if cluster_queue is not None:
            found = found or _above_queue(job, request, cluster_queue)
    if found is None and job.spec.queue is None:
        found = next((_no_room_now(job, request, quotas) for request in requests if request.stage == due), None)
    return found


def _claim_problem(job: FineTuneJob, claim: ClaimFacts) -> Waiting | None:
    nodes = job.spec.accelerator.nodes
    modes = ", ".join(claim.access_modes)
    if claim.phase is None or not claim.access_modes or READ_WRITE_MANY in claim.access_modes:
        return None  # a missing claim is prerequisites.py's
    remedy = f"name a {READ_WRITE_MANY} claim in spec.workspace.claimName (suspend the job first)"
    if nodes > 1:
        return Waiting(
            Reason.CLAIM_NOT_SHARED,
            f"PersistentVolumeClaim {claim.name} in namespace {job.namespace} has access mode {modes}, and the "
            f"{nodes} nodes of the training write to it at once: {remedy}, or set spec.accelerator.nodes to 1.",
        )
    if set(claim.access_modes) == {READ_ONLY_MANY}:
        return Waiting(
            Reason.CLAIM_NOT_SHARED,
            f"PersistentVolumeClaim {claim.name} in namespace {job.namespace} has access mode {modes}, and every stage "
            f"writes to it: {remedy}.",
        )
    return None


def _never_fits(job: FineTuneJob, request: PodRequests, quotas: Iterable[Quota]) -> Waiting | None:
    for quota in quotas:
        for name, needed in _counted(request, quota):
            if needed > quota.hard[name]:
                shown, most = format_quantity(needed, name), format_quantity(quota.hard[name], name)
                return Waiting(
                    Reason.QUOTA_EXCEEDS_MAX,
                    f"Stage {request.stage} asks for {name} {shown}{_of_pods(request)}, and ResourceQuota {quota.name} "
                    f"of namespace {job.namespace} allows {most} in all, so it can never run there: {_lower(request)}, "
                    "or have the quota raised.",
                )
    return None


def _no_room_now(job: FineTuneJob, request: PodRequests, quotas: Iterable[Quota]) -> Waiting | None:
    for quota in quotas:
        for name, needed in _counted(request, quota):
            used = quota.used.get(name, Decimal(0))
            if used + needed > quota.hard[name]:
                shown, most, taken = (format_quantity(value, name) for value in (needed, quota.hard[name], used))
                return Waiting(
                    Reason.QUOTA_EXCEEDED,
                    f"Stage {request.stage} asks for {name} {shown}{_of_pods(request)}; of ResourceQuota {quota.name} "
                    f"in namespace {job.namespace} {taken} of {most} are used. It starts when there is room.",
                )
    return None


def _above_queue(job: FineTuneJob, request: PodRequests, queue: ClusterQueue) -> Waiting | None:
    for flavors in queue.groups:
        short = [shortage for flavor in flavors if (shortage := _shortage(request, flavor)) is not None]
        if flavors and len(short) == len(flavors):
            return Waiting(
                Reason.QUOTA_EXCEEDS_MAX,
                f"Stage {request.stage} can never be admitted: ClusterQueue {queue.name} gives at most "
                f"{'; '.join(short)}{_of_pods(request)}. {_lower(request).capitalize()}, have the quota raised, or use "
                "another queue (suspend the job first).",
            )
    return None


def _shortage(request: PodRequests, flavor: Flavor) -> str | None:
    """Words for the first resource of which the flavor never has enough."""
    for name, most in flavor.most.items():
        needed = request.requests.get(name, Decimal(0))
        if most is not None and needed > most:
            return (
                f"{name} {format_quantity(most, name)} of {flavor.name}, asked for are {format_quantity(needed, name)}"
            )
    return None


def _most(resource: Raw, in_cohort: bool) -> Decimal | None:
    quantities = parse_quantities({key: resource[key] for key in ("nominalQuota", "borrowingLimit") if key in resource})
    nominal, limit = quantities.get("nominalQuota", Decimal(0)), quantities.get("borrowingLimit")
    if not in_cohort:
        return nominal
    return None if limit is None else nominal + limit


def _counted(request: PodRequests, quota: Quota) -> Iterator[tuple[str, Decimal]]:
    """(entry of the quota, how much the stage adds to it) for every entry that the stage adds to."""
    if not all(_in_scope(request, scope) for scope in quota.scopes):
        return
    for name in quota.hard:
        needed = _added(request, name)
        if needed:
            yield name, needed


def _added(request: PodRequests, name: str) -> Decimal:
    """How much the stage adds to one entry of a quota; names as in Kubernetes' page "Resource Quotas"."""
    if name in ("pods", "count/pods"):
        return Decimal(request.pods)
    if name == "count/jobs.batch":
        return Decimal(1)
    kind, dot, resource = name.partition(".")
    if dot and kind in ("requests", "limits"):
        of = request.requests if kind == "requests" else request.limits
        return of.get(resource, Decimal(0))
    return request.requests.get(name, Decimal(0))


def _in_scope(request: PodRequests, scope: Raw) -> bool:
    name, operator, values = scope.get("scopeName"), scope.get("operator"), scope.get("values") or ()
    if name == "PriorityClass":
        has = request.priority_class
        return {
            "Exists": has is not None,
            "DoesNotExist": has is None,
            "In": has in values,
            "NotIn": has not in values,
        }.get(str(operator), False)
    best_effort = not ({"cpu", "memory"} & (request.requests.keys() | request.limits.keys()))
    # A stage's deadline is its Job's; Terminating asks for one of the pod itself.
    return {"NotTerminating": True, "BestEffort": best_effort, "NotBestEffort": not best_effort}.get(str(name), False)


def _add(total: dict[str, Decimal], more: Mapping[str, Decimal]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, Decimal(0)) + value


def _of_pods(request: PodRequests) -> str:
    return f" in {request.pods} pods" if request.pods > 1 else ""


def _lower(request: PodRequests) -> str:
    resources = f"lower stages.{request.stage}.resources"
    return f"lower spec.accelerator.nodes or {resources.removeprefix('lower ')}" if request.pods > 1 else resources
