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
from finetune_operator.core.parallelism import Parallelism
from finetune_operator.core.quantities import format_quantity, parse_quantities
from finetune_trainer import contract
from finetune_trainer.neuron_environment import cache_paths, compiled_with
from finetune_trainer.neuron_rules import (
    NeuronModel,
    NeuronNode,
    check_caches,
    check_cores,
    check_groups,
    check_model,
    check_stack,
    split_problems,
    stack_doubt,
)
from finetune_trainer.neuron_stack import sdk_of_image
from finetune_trainer.spec_rules import template_fields

Raw = Mapping[str, Any]

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
    return tuple(_doubts(job, parallelism, shape, instance, pod_memory_bytes))


def _doubts(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    pod_memory_bytes: int | None,
) -> Iterator[str]:
    tp = parallelism.tp_size
    if instance is not None and job.spec.accelerator.type == "neuron" and tp > instance.cores:
        yield (
            f"tensorParallelSize {tp} is more than the {instance.cores} NeuronCores of {instance.name}: every layer of "
            "the model then waits for the network, and nothing is known of how the vendor's stack fares with it; a "
            f"tensorParallelSize of at most {instance.cores} with parallelism.pipelineParallelSize keeps layers on a "
            "node."
        )
    if shape is None:
        yield "The model's sizes are not known yet: heads, layers and memory are checked after prepare."
        return
    room = _room(job, parallelism, instance, pod_memory_bytes)
    estimate = estimate_memory(job.spec, parallelism, shape)
    if room is not None and estimate.least <= room.bytes < estimate.total:
        yield (
            f"The training may need {_gib(estimate.total)} on {room.where}, {_gib(room.bytes)} are there "
            f"({_parts(estimate)}). If it ends with {Reason.OUT_OF_DEVICE_MEMORY} or {Reason.OUT_OF_HOST_MEMORY}, "
            "lower training.microBatchSize or dataset.maxLength."
        )


def _spec_problems(
    job: FineTuneJob,
    parallelism: Parallelism,
    shape: ModelShape | None,
    instance: InstanceType | None,
    pod_memory_bytes: int | None,
) -> Iterator[Problem]:
    yield from _network_problems(job, instance)
    if instance is not None and job.spec.accelerator.type == "neuron":
        node, sizes = NeuronNode(instance.name, instance.cores), parallelism.as_json()
        yield from (*check_cores(sizes, node), *check_groups(sizes, node))
    yield from _prompt_problems(job)
    if shape is None:
        return
    yield from _model_problems(job, parallelism, shape, instance)
    yield from _tied_problems(job, shape)
    room = _room(job, parallelism, instance, pod_memory_bytes)
    if room is not None:
        estimate = estimate_memory(job.spec, parallelism, shape)
        if estimate.least > room.bytes:
            yield Problem(room.field, _gib(room.bytes), _too_large(job, parallelism, estimate, room))


def _network_problems(job: FineTuneJob, instance: InstanceType | None) -> Iterator[Problem]:
    """Trainium nodes that could not talk to each other: the vendor's collectives need EFA between nodes.

    Source: Neuron SDK documentation, “How to prepare trn1.32xlarge for multi-node execution”.
    """
    if instance is None or instance.accelerator != "neuron" or instance.efa or job.spec.accelerator.nodes == 1:
        return
    yield Problem(
        "spec.accelerator.nodes",
        job.spec.accelerator.nodes,
        f"{job.spec.accelerator.nodes} nodes of {instance.name} cannot train together: it has no EFA interface, which "
        "collectives between Trainium nodes need; use 1 node, or an instanceType with EFA such as ml.trn1.32xlarge",
    )


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


def _model_problems(
    job: FineTuneJob, parallelism: Parallelism, shape: ModelShape, instance: InstanceType | None
) -> Iterator[Problem]:
    """A model that cannot be split so, and on Neuron all else that the vendor cannot train of it."""
    model = NeuronModel(
        model_type=shape.model_type,
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        layers=shape.layers,
        tied=shape.tied,
        biased=shape.biased,
    )
    node = None if instance is None else NeuronNode(instance.name, instance.cores)
    tp, pp = parallelism.tp_size, parallelism.pp_size
    if job.spec.accelerator.type == "neuron":
        yield from check_model(job.spec.method.as_json(), tp, pp, model, node)
    else:
        yield from split_problems(tp, pp, model, node)


# ---- what the pods of compile and train run in


def check_pair(instance: InstanceType | None, images: Iterable[str]) -> Waiting | None:
    """Why the training's images cannot use the Neuron devices of `instance`; None where nothing is known against it."""
    if instance is None or instance.accelerator != "neuron":
        return None
    for image in images:
        problem = check_stack(instance.name, sdk_of_image(image))
        if problem is not None:
            return Waiting(Reason.UNSUPPORTED_INSTANCE_SDK_PAIR, str(problem))
    return None


def pair_doubts(instance: InstanceType | None, images: Iterable[str]) -> tuple[str, ...]:
    """What is not sure about instance and images, as sentences."""
    if instance is None or instance.accelerator != "neuron":
        return ()
    doubts = (stack_doubt(instance.name, sdk) for sdk in dict.fromkeys(map(sdk_of_image, images)))
    return tuple(doubt for doubt in doubts if doubt is not None)


def check_environments(environments: Mapping[str, Mapping[str, str]]) -> tuple[Problem, ...]:
    """What is wrong with the variables of stages on Neuron devices, by stage: chart and spec can set any.

    A cache that the vendor's tools would not find, and variables of the compiler that compile and train do not have in
    common: train would compile all of its graphs again.
    """
    found = [
        problem for stage, environment in environments.items() for problem in check_caches(environment, _env_of(stage))
    ]
    if contract.COMPILE in environments and contract.TRAIN in environments:
        compiled, trained = (
            {**compiled_with(environments[stage]), "the cache": cache_paths(environments[stage])}
            for stage in (contract.COMPILE, contract.TRAIN)
        )
        for name in sorted(name for name in {*compiled, *trained} if compiled.get(name) != trained.get(name)):
            values = [each.get(name, "absent") for each in (compiled, trained)]
            found.append(
                Problem(
                    _env_of(contract.COMPILE),
                    values,
                    f"{name} is {values[0]!r} in compile and {values[1]!r} in train, whose graphs then would not be "
                    "found: set it in stages.train.env alone, which compile has too, and in the chart for both",
                )
            )
    return tuple(found)


def _env_of(stage: str) -> str:
    return f"spec.stages.{stage}.env"


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
            if not on_torch:
                changes.append("take more nodes, whose data parallel ranks share the optimizer")
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
