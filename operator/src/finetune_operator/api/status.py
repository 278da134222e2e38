"""The typed status of a FineTuneJob: the observation, derived anew each time from the job's children.

The operator writes it through the status subresource. Fields marked print-only exist for columns and people; no code
decides by them. Lists are bounded so that a status never outgrows the API server's limits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.model import LabelKey, StatusModel, Timestamp

ConditionStatus = Literal["True", "False", "Unknown"]

MAX_ATTEMPTS = 20
"""Entries of status.attempts; the oldest fall out."""

MAX_NODES = 64
"""Nodes named in one stage's status; a larger gang's are not all listed."""

_Text = Annotated[str, Field(max_length=1024)]
_Message = Annotated[str, Field(max_length=32768)]
_Word = Annotated[str, Field(max_length=64)]
_Name = Annotated[str, Field(max_length=253)]
_Digest = Annotated[str, Field(max_length=128)]
_Log = Annotated[
    tuple[Annotated[str, Field(max_length=300)], ...],
    Field(max_length=20, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
]
"""Lines of a log: records.LOG_MAX_LINES of log_tail.MAX_LINE_LENGTH characters."""


class Condition(StatusModel):
    """One aspect of the job, in the form of metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316)] = Field(
        description="The aspect, such as Succeeded, Validated or Trained."
    )
    status: ConditionStatus = Field(description="True, False or Unknown.")
    observed_generation: int = Field(
        default=0, ge=0, description="Generation of the spec that the condition speaks of."
    )
    last_transition_time: Timestamp = Field(description="When the status last changed.")
    reason: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        description="One CamelCase word of a closed list: why."
    )
    message: _Message = Field(default="", description="A sentence: what happened, where, and what to do next.")


class Artifact(StatusModel):
    """A complete artifact on the workspace volume."""

    path: _Text = Field(description="Folder, relative to the root of the workspace volume.")
    digest: _Digest = Field(description="sha256 of its manifest, as sha256:<hex>.")


class StageStatus(StatusModel):
    """One stage of the job."""

    name: _Word = Field(description="The stage: prepare, compile, train, consolidate, merge, evaluate or publish.")
    state: _Word = Field(
        description="Waiting, Starting, Running, Retrying, Succeeded, Reused, Skipped, Suspended or Failed."
    )
    attempt: int = Field(default=0, ge=0, description="Number of the newest attempt, 1 for the first; 0 before it.")
    job_name: _Name | None = Field(default=None, description="The batch/v1 Job of the newest attempt.")
    start_time: Timestamp | None = Field(default=None, description="When the newest attempt's Job was created.")
    completion_time: Timestamp | None = Field(default=None, description="When the stage ended.")
    duration_seconds: int | None = Field(default=None, ge=0, description="Time from start to end, in seconds.")
    input_digest: _Digest | None = Field(
        default=None, description="Digest of everything that the stage reads; it names Job and output."
    )
    artifact: Artifact | None = Field(default=None, description="What the stage wrote.")
    reason: _Word | None = Field(default=None, description="Why the stage is in this state, one CamelCase word.")
    message: _Message | None = Field(default=None, description="The same as a sentence, with what to do next.")
    exit_code: int | None = Field(
        default=None, description="Exit code of the newest attempt's failed or last container."
    )
    nodes: Annotated[tuple[_Name, ...], Field(max_length=MAX_NODES)] = Field(
        default=(), description="Kubernetes nodes of the newest attempt's pods, the first of them if there are many."
    )
    queue_seconds: int | None = Field(
        default=None, ge=0, description="Time that the newest attempt waited for its queue's quota, in seconds."
    )
    log: _Log = Field(
        default=(),
        description="Last lines of the newest attempt's failing container's log, oldest first; secrets are masked.",
    )


class Checkpoint(StatusModel):
    """A complete checkpoint."""

    step: int = Field(ge=0, description="Step after which it was written.")
    time: Timestamp | None = Field(default=None, description="When it was written.")


class TrainingStatus(StatusModel):
    """How the training stands, as last reported."""

    step: int | None = Field(default=None, ge=0, description="Steps done.")
    total_steps: int | None = Field(default=None, ge=0, description="Steps to do in all.")
    loss: float | None = Field(default=None, description="Training loss of the last logged step.")
    tokens_per_second: float | None = Field(
        default=None, ge=0, description="Tokens trained on in a second, all ranks together."
    )
    mfu: float | None = Field(
        default=None,
        ge=0,
        description="Share of the devices' peak that the model's arithmetic takes; frozen weights need no gradient.",
    )
    last_checkpoint: Checkpoint | None = Field(default=None, description="The newest complete checkpoint.")
    goodput: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="At the end: the share of the training's time that went into steps which were kept.",
    )


class PromptAnswers(StatusModel):
    """What both models answered to one of the job's prompts."""

    prompt: Annotated[str, Field(max_length=8192)] = Field(description="The prompt's text.")
    expected: Annotated[str, Field(max_length=8192)] | None = Field(
        default=None, description="The right answer, where the spec has one."
    )
    base: Annotated[str, Field(max_length=8192)] | None = Field(default=None, description="The base model's answer.")
    tuned: Annotated[str, Field(max_length=8192)] | None = Field(default=None, description="The tuned model's answer.")


class EvaluationStatus(StatusModel):
    """Losses on the held-out records, answers to the job's prompts, and how near these come to the expected ones."""

    base_loss: float | None = Field(default=None, description="Held-out loss of the base model, in nats a token.")
    tuned_loss: float | None = Field(default=None, description="Held-out loss of the tuned model, in nats a token.")
    base_perplexity: float | None = Field(default=None, description="exp(loss) of the base model.")
    tuned_perplexity: float | None = Field(default=None, description="exp(loss) of the tuned model.")
    prompts_compared: int | None = Field(
        default=None, ge=0, description="Number of prompts with an expected answer, over which the means are taken."
    )
    base_exact_match: float | None = Field(
        default=None, description="Share of these prompts that the base model answers with exactly the expected text."
    )
    tuned_exact_match: float | None = Field(
        default=None, description="Share of these prompts that the tuned model answers with exactly the expected text."
    )
    base_rouge_l: float | None = Field(
        default=None, description="Mean ROUGE-L (F-measure) of the base model's answers."
    )
    tuned_rouge_l: float | None = Field(
        default=None, description="Mean ROUGE-L (F-measure) of the tuned model's answers."
    )
    prompts: Annotated[
        tuple[PromptAnswers, ...], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(
        default=(),
        description="Answers to spec.evaluate.prompts as far as they fit the report; the artifact has all of them.",
    )


class AttemptStatus(StatusModel):
    """One attempt of a stage that ended without its artifact."""

    stage: _Word = Field(description="The stage.")
    attempt: int = Field(ge=1, description="Number of the attempt within the stage.")
    job_name: _Name | None = Field(default=None, description="The attempt's batch/v1 Job.")
    end_time: Timestamp | None = Field(default=None, description="When it ended.")
    reason: _Word = Field(description="Why it ended, one CamelCase word.")
    message: Annotated[str, Field(max_length=4096)] = Field(default="", description="The same as a sentence.")
    exit_code: int | None = Field(default=None, description="Exit code of the container that failed first, if one did.")
    node: _Name | None = Field(default=None, description="Kubernetes node of the pod that failed first.")
    counted: bool = Field(default=True, description="Whether the attempt used up one of retryPolicy.maxRetries.")
    lost_steps: int | None = Field(
        default=None, ge=0, description="Steps done since the last checkpoint, which the next attempt does again."
    )
    recovery_seconds: int | None = Field(
        default=None, ge=0, description="Time from its end until every pod of the next attempt ran, in seconds."
    )
    log: _Log = Field(
        default=(),
        description="Last lines of the log of the container that failed first, oldest first; secrets are masked.",
    )


class Artifacts(StatusModel):
    """Where the results lie."""

    adapter: Artifact | None = Field(default=None, description="The adapter in PEFT's layout.")
    model: Artifact | None = Field(default=None, description="The whole tuned model in the hub's layout.")
    evaluation: Artifact | None = Field(default=None, description="The comparison of base and tuned model.")


_Quantities = Annotated[dict[LabelKey, _Word], Field(max_length=16)]
_Currency = Annotated[str, Field(max_length=3)]


class PlannedStage(StatusModel):
    """A stage's Job as a dry run would make it."""

    name: _Word = Field(description="The stage.")
    job_name: _Name | None = Field(
        default=None,
        description="Name of its first batch/v1 Job; absent where that depends on artifacts which do not exist yet.",
    )
    pods: int = Field(ge=1, description="Pods of the Job.")
    instance_type: _Word | None = Field(
        default=None, description="Instance type of its nodes; absent where any node will do."
    )
    requests: _Quantities = Field(default_factory=dict, description="Resources that one pod asks for, by name.")
    limits: _Quantities = Field(default_factory=dict, description="Resources that one pod never exceeds, by name.")
    image: Annotated[str, Field(max_length=512)] = Field(description="Image of the pods.")
    queue: _Name | None = Field(default=None, description="LocalQueue that admits the Job; absent: none.")


class MemoryParts(StatusModel):
    """Memory of one device's share of the training, in GiB, by what it is for."""

    weights: float = Field(ge=0, description="Weights, and the adapter's, in GiB.")
    gradients: float = Field(ge=0, description="Gradients, in GiB.")
    optimizer: float = Field(ge=0, description="Optimizer states, in GiB.")
    activations: float = Field(ge=0, description="Activations kept for the backward pass, in GiB.")
    logits: float = Field(ge=0, description="Logits and what the loss makes of them, in GiB.")


class PlanEstimate(StatusModel):
    """What the training will take, by arithmetic."""

    memory_gib_per_device: float | None = Field(
        default=None,
        ge=0,
        description="Memory of one training process, on a device of its own or a NeuronCore, in GiB; absent while the "
        "model's sizes are not known.",
    )
    device_memory_gib: float | None = Field(
        default=None, ge=0, description="Memory that one training process has there, in GiB, where it is known."
    )
    parts: MemoryParts | None = Field(default=None, description="memoryGibPerDevice by what it is for.")
    train_hours: float | None = Field(
        default=None, ge=0, description="Time of the train stage without waits and faults, in hours, where it is known."
    )
    assumptions: _Message = Field(default="", description="What the figures suppose, and why one is absent.")


class PlanCost(StatusModel):
    """What the training will cost."""

    amount: float = Field(ge=0, description="Price of the train stage's nodes for trainHours.")
    currency: _Currency = Field(description="Currency of amount, such as USD.")


class PlanStatus(StatusModel):
    """What spec.dryRun reports: the Jobs and figures of what is still to run, of which nothing is started."""

    message: _Message = Field(default="", description="What the job would do, and what would keep it from that.")
    world_size: int = Field(ge=1, description="Training processes in all.")
    data_parallel_size: int = Field(ge=1, description="Copies of the model that train side by side.")
    global_batch_size: int = Field(ge=1, description="Rows of one step.")
    trainable_parameters: int | None = Field(
        default=None, ge=0, description="Parameters that training changes; absent while the model's sizes are unknown."
    )
    stages: Annotated[
        tuple[PlannedStage, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(default=(), description="The stages that would run, in order.")
    estimate: PlanEstimate | None = Field(default=None, description="What the training will take, by arithmetic.")
    cost: PlanCost | None = Field(
        default=None, description="What the training will cost, where prices are configured and its time is known."
    )


class Cost(StatusModel):
    """What the attempts that have ended took, as far as their Jobs are still there."""

    pod_seconds: int | None = Field(
        default=None,
        ge=0,
        description="Time for which their pods had a node, all together, in seconds. Attempts of an earlier spec are "
        "not in it, nor is the time before a queue took its quota back.",
    )
    amount: float | None = Field(
        default=None,
        ge=0,
        description="Price of the time on accelerator nodes in it; absent where the chart's instanceTypes have no "
        "pricePerHour for them.",
    )
    currency: _Currency | None = Field(default=None, description="Currency of amount, such as USD.")


class FineTuneJobStatus(StatusModel):
    """What is observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="Generation of the spec that this status was derived from."
    )
    spec_digest: _Digest | None = Field(
        default=None,
        description="Digest of the spec that this status was derived from, ttlSecondsAfterFinished left out.",
    )
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=32, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = Field(
        default=(),
        description="The truth about the job. Succeeded is Unknown while the job is under way and True or False at "
        "its end.",
    )
    phase: _Word | None = Field(default=None, description="Print-only, derived from conditions: the job in one word.")
    stage: _Word | None = Field(
        default=None, description="Print-only: place and name of the current stage, such as `2/5 train`."
    )
    progress: _Word | None = Field(default=None, description="Print-only: share of the work done, such as `62%`.")
    eta: _Word | None = Field(default=None, description="Print-only: estimated time to the end, such as `1h20m`.")
    reason: _Word | None = Field(default=None, description="Print-only: the reason that matters most now.")
    message: _Message | None = Field(default=None, description="Print-only: the sentence that belongs to reason.")
    start_time: Timestamp | None = Field(default=None, description="When the first stage was started.")
    completion_time: Timestamp | None = Field(
        default=None, description="When the job reached its end, Succeeded or Failed; absent while it is under way."
    )
    stages: Annotated[
        tuple[StageStatus, ...],
        Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(default=(), description="Every stage of the job in the order in which they run.")
    training: TrainingStatus | None = Field(default=None, description="How the training stands, as last reported.")
    evaluation: EvaluationStatus | None = Field(default=None, description="Losses on the held-out records.")
    attempts: Annotated[
        tuple[AttemptStatus, ...],
        Field(max_length=MAX_ATTEMPTS, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ] = Field(default=(), description="The last attempts that ended without their artifact, oldest first.")
    restarts: int | None = Field(
        default=None, ge=0, description="Attempts that ended without their artifact, of all stages together."
    )
    artifacts: Artifacts | None = Field(default=None, description="Where the results lie on the workspace volume.")
    trainable_parameters: int | None = Field(default=None, ge=0, description="Parameters that training changes.")
    cost: Cost | None = Field(default=None, description="What the attempts that have ended took.")
    plan: PlanStatus | None = Field(default=None, description="What spec.dryRun reports; absent without it.")
