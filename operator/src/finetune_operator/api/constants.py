"""Every name of the API in one place: group, labels, condition types, reasons, events, phases, stage states.

Every other module takes its words from here, and docs/api.md lists the closed enumerations of this file. It decides
nothing and imports nothing of the product but the stages' names.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

from finetune_trainer import contract

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
LIST_KIND = "FineTuneJobList"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
CATEGORY = "ml"
CRD_NAME = f"{PLURAL}.{GROUP}"

MAX_JOB_NAME_LENGTH = 63
"""The name of a FineTuneJob is a label's value on its children, and labels hold 63 characters."""

FIELD_MANAGER = "finetune-operator"
"""Owner of the fields that the operator applies server-side."""
MANAGED_BY = "finetune-operator"
CONTAINER_NAME = "stage"
"""The one container of every stage's pods."""

PREFIX = f"{GROUP}/"
LABEL_JOB_UID = f"{PREFIX}job-uid"
LABEL_JOB_NAME = f"{PREFIX}job-name"
LABEL_STAGE = f"{PREFIX}stage"
LABEL_STAGE_DIGEST = f"{PREFIX}stage-digest"
"""First 16 hexadecimal digits of the stage's digest."""
LABEL_ATTEMPT = f"{PREFIX}attempt"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
"""Kueue's, on a queued stage's Job and pods."""
ANNOTATION_REPORT = f"{PREFIX}report"
"""On a stage's Job: the report of its pods once seen, so that it outlives them."""
ANNOTATION_STAGE_JSON = f"{PREFIX}stage.json"
"""On a stage's pods: the file that the stage runs from, mounted by the downward API."""
ANNOTATION_PROGRESS_CA = f"{PREFIX}progress-ca.crt"
"""On a stage's pods: the certificates that the stage trusts for the progress endpoint, mounted likewise."""
ANNOTATION_CHECKPOINT_STEP = f"{PREFIX}last-checkpoint-step"
ANNOTATION_CHECKPOINT_TIME = f"{PREFIX}last-checkpoint-time"
"""On a training's Job and pods: the newest complete checkpoint, for whoever chooses what to preempt."""
ANNOTATION_PREEMPTIONS = f"{PREFIX}preemptions"
"""On a queued stage's Job: the times that Kueue took its quota back, since Job and attempt stay the same."""
ANNOTATION_KOPF_PREFIX = GROUP
"""Prefix of what kopf itself stores on a FineTuneJob."""


class Word(StrEnum):
    """A member of a closed list of words, with its meaning for the reference."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Word:
        word = str.__new__(cls, value)
        word._value_ = value
        word.meaning = meaning
        return word


class Phase(Word):
    """status.phase: one word for people, derived from the conditions and read by nobody."""

    PENDING = "Pending", "Nothing was started yet, or spec.dryRun keeps the next stage from it."
    QUEUED = "Queued", "The current stage, or the whole pipeline, waits for quota."
    PREPARING = "Preparing", "Stage prepare is current."
    COMPILING = "Compiling", "Stage compile is current."
    TRAINING = "Training", "Stage train is current."
    CONSOLIDATING = "Consolidating", "Stage consolidate is current."
    MERGING = "Merging", "Stage merge is current."
    EVALUATING = "Evaluating", "Stage evaluate is current."
    PUBLISHING = "Publishing", "Stage publish is current."
    SUCCEEDED = "Succeeded", "Every stage ended well."
    FAILED = "Failed", "The job ended without its result; reason and message say why."
    SUSPENDED = "Suspended", "spec.suspend holds the job."


class StageState(Word):
    """status.stages[].state."""

    WAITING = "Waiting", "An earlier stage has to end first."
    QUEUED = "Queued", "The stage's Job is suspended and waits for Kueue, or its reservation does."
    STARTING = "Starting", "The stage's Job exists, and not all of its pods run."
    RUNNING = "Running", "The stage's pods run."
    RETRYING = "Retrying", "An attempt ended, and the next one has not begun."
    SUCCEEDED = "Succeeded", "The stage's artifact is complete."
    REUSED = "Reused", "A complete artifact of the same inputs was there already."
    SKIPPED = "Skipped", "The spec does not ask for the stage."
    SUSPENDED = "Suspended", "The stage waits for spec.suspend to be lifted."
    FAILED = "Failed", "The stage ended without its artifact, and is not tried again."


class ConditionType(Word):
    """status.conditions[].type, in the order in which they are listed."""

    SUCCEEDED = "Succeeded", "The whole job. Unknown while it is under way, True or False at its end."
    VALIDATED = "Validated", "False: the spec asks for what is wrong or not available. True: may go on with doubts."
    STORAGE_READY = "StorageReady", "The workspace's claim and the Secrets that a stage mounts are there."
    QUOTA_RESERVED = "QuotaReserved", "Kueue admitted the current stage or the whole pipeline; reasons are Kueue's."
    HEALTHY = "Healthy", "False after a node's fault or a hang, until the next attempt runs."
    SUSPENDED = "Suspended", "True: spec.suspend is set and no pod of the job is left."
    DATA_PREPARED = "DataPrepared", "Base model, dataset and rows of tokens lie on the workspace."
    COMPILED = "Compiled", "The training graphs are in the compiler's cache."
    TRAINED = "Trained", "The training reached its last step, and its last checkpoint is complete."
    CONSOLIDATED = "Consolidated", "The sharded checkpoint is one adapter or model."
    MERGED = "Merged", "The adapter is in the base model."
    EVALUATED = "Evaluated", "Base and tuned model were compared. False with reason GateNotMet: a threshold was missed."
    PUBLISHED = "Published", "The result is where spec.publish asks for it."


class Reason(Word):
    """Reasons of conditions, stages, attempts and status.reason: a closed list."""

    # how it goes
    VALID = "Valid", "Every check of the spec passed."
    PENDING = "Pending", "Nothing was started yet."
    WAITING = "Waiting", "An earlier stage has to end first."
    QUEUED = "Queued", "Kueue has not admitted the stage yet; the message has its own reason and words."
    STARTING = "Starting", "The pods of the stage are being created, or their images pulled."
    RUNNING = "Running", "The pods of the stage run."
    RETRYING = "Retrying", "An attempt ended without its artifact; the next one starts by itself."
    COMPLETED = "Completed", "Done."
    REUSED = "Reused", "A complete artifact of the same inputs was there already; nothing was run."
    SKIPPED = "Skipped", "The spec does not ask for the stage."
    NOT_SUSPENDED = "NotSuspended", "spec.suspend is false."
    SUSPENDING = "Suspending", "spec.suspend is true, and pods of the job are still ending."
    SUSPENDED = "Suspended", "spec.suspend is true, and no pod of the job is left."
    DRY_RUN = "DryRun", "spec.dryRun is true: the plan is in status.plan, and nothing is started."
    # the spec
    INVALID_SPEC = "InvalidSpec", "A field of the spec is wrong; the message names each with a remedy."
    FEATURE_NOT_AVAILABLE = "FeatureNotAvailable", "The spec asks for what this release does not do yet."
    UNKNOWN_INSTANCE_TYPE = "UnknownInstanceType", "The instance type is not in the table, or has another accelerator."
    UNSUPPORTED_INSTANCE_SDK_PAIR = (
        "UnsupportedInstanceSdkPair",
        "The training's image has a Neuron SDK that is known not to train on the instance type.",
    )
    NEURON_RESOURCE_NAME_MISMATCH = (
        "NeuronResourceNameMismatch",
        "Nodes and ClusterQueue name the Neuron devices differently; the message has both names.",
    )
    NAME_CONFLICT = "NameConflict", "An object of a child's name exists and is not this job's."
    # a stage said so, by its exit code and report
    USER_ERROR = "UserError", "The stage found the spec or the data wrong; it is not tried again."
    RETRYABLE_ERROR = "RetryableError", "Something outside the stage failed: network, a peer, storage."
    OUT_OF_HOST_MEMORY = "OutOfHostMemory", "The pod used more memory than its limit or its node has."
    OUT_OF_DEVICE_MEMORY = "OutOfDeviceMemory", "The accelerator's memory did not suffice."
    CORRUPT_ARTIFACT = "CorruptArtifact", "An input or a checkpoint is damaged, and no older one can be used."
    INTERRUPTED = "Interrupted", "The stage was told to end (SIGTERM); the next attempt goes on from its checkpoint."
    COLLECTIVE_TIMEOUT = "CollectiveTimeout", "A rank lost its peers, and no pod or node says why."
    UNEXPECTED_ERROR = "UnexpectedError", "The stage ended with an exception that it does not know."
    CRASHED = "Crashed", "The stage's process crashed: a fault in native code, a driver or the machine."
    KILLED = "Killed", "The stage was killed from outside: not for memory, and not by the pod's deletion."
    HANGING = "Hanging", "The stage made no progress for too long, and was stopped."
    STAGE_DEADLINE_EXCEEDED = "StageDeadlineExceeded", "An attempt took longer than its stage may."
    REPORT_MISSING = "ReportMissing", "The stage ended with exit code 0 and without a valid report."
    GATE_NOT_MET = "GateNotMet", "The tuned model missed a threshold of spec.evaluate.gate."
    # the cluster did it
    EVICTED = "Evicted", "A pod was evicted, for a drained node or a lack of memory or disk there."
    PREEMPTED = "Preempted", "A pod gave way to one of higher priority."
    NODE_FAULT = "NodeFault", "The node of a pod was found faulty; the attempt was ended at once."
    NODE_LOST = "NodeLost", "The node of a pod is gone, shuts down or does not answer."
    NODE_REFUSED = "NodeRefused", "The kubelet of the chosen node refused a pod."
    POD_DELETED = "PodDeleted", "Somebody or something deleted a pod."
    POD_FAILED = "PodFailed", "A pod failed, and neither its container nor its conditions say why."
    # why a pod does not start
    UNSCHEDULABLE = "Unschedulable", "No node can take a pod; the message has the scheduler's words."
    IMAGE_PULL_FAILED = "ImagePullFailed", "The stage's image cannot be pulled."
    CLAIM_NOT_BOUND = "ClaimNotBound", "The workspace's claim has no volume yet."
    CLAIM_MISSING = "ClaimMissing", "The workspace's claim does not exist in the job's namespace."
    CLAIM_NOT_SHARED = "ClaimNotShared", "The workspace's claim cannot be written to by all nodes of the training."
    SECRET_MISSING = "SecretMissing", "A referenced Secret or its key does not exist in the job's namespace."
    MOUNT_FAILED = "MountFailed", "The node cannot mount a volume of the stage's pod."
    CONTAINER_CONFIG_ERROR = "ContainerConfigError", "The kubelet cannot make or start the stage's container."
    QUEUE_UNAVAILABLE = "QueueUnavailable", "spec.queue is set, and Kueue is not there or does not take up the job."
    QUOTA_EXCEEDED = "QuotaExceeded", "A quota of the namespace has no room for the stage's objects now."
    QUOTA_EXCEEDS_MAX = "QuotaExceedsMax", "A stage asks for more than a quota or the queue can ever give."
    CHILD_REFUSED = "ChildRefused", "The API server or a policy refuses an object of the stage; the message says why."
    # how it ended
    RETRIES_EXHAUSTED = "RetriesExhausted", "A stage failed more often than retryPolicy.maxRetries allows."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The job took longer than activeDeadlineSeconds."


class EventReason(Word):
    """Reasons of the events posted on a FineTuneJob; there are no others.

    A job's end has no reason of its own: it is its last stage's, or the condition Succeeded that says so.
    """

    STAGE_STARTED = "StageStarted", "A stage began; not said of one that follows another at once."
    STAGE_SUCCEEDED = "StageSucceeded", "A stage's artifact is complete."
    STAGE_SKIPPED = "StageSkipped", "A stage found its artifact complete: nothing was run."
    STAGE_FAILED = "StageFailed", "An attempt of a stage ended without its artifact, or its retries or time are spent."
    ATTEMPT_RESTARTED = "AttemptRestarted", "A stage runs again after a failure: how long it took, and the steps lost."
    CHECKPOINT_VERIFIED = "CheckpointVerified", "A new checkpoint of the training is complete: it can be resumed from."
    QUEUED = "Queued", "A stage waits for Kueue to admit it."
    ADMITTED = "Admitted", "Kueue admitted a stage that had waited."
    PREEMPTED = "Preempted", "An attempt was stopped to make room for another."
    NODE_FAULT_DETECTED = "NodeFaultDetected", "The node of a pod is faulty or gone; the attempt was ended at once."
    HANG_DETECTED = "HangDetected", "A training made no step for too long, and was stopped."
    EVAL_PASSED = "EvalPassed", "Base and tuned model were compared, and every threshold of the gate is met."
    EVAL_FAILED = "EvalFailed", "The tuned model missed a threshold of spec.evaluate.gate."
    PUBLISHED = "Published", "The result is where spec.publish asks for it."
    VALIDATION_FAILED = "ValidationFailed", "The spec is wrong or asks for what is not available."


STAGE_CONDITIONS = MappingProxyType(
    {
        contract.PREPARE: ConditionType.DATA_PREPARED,
        contract.COMPILE: ConditionType.COMPILED,
        contract.TRAIN: ConditionType.TRAINED,
        contract.CONSOLIDATE: ConditionType.CONSOLIDATED,
        contract.MERGE: ConditionType.MERGED,
        contract.EVALUATE: ConditionType.EVALUATED,
        contract.PUBLISH: ConditionType.PUBLISHED,
    }
)
"""The condition that says how a stage stands."""

STAGE_PHASES = MappingProxyType(
    {
        contract.PREPARE: Phase.PREPARING,
        contract.COMPILE: Phase.COMPILING,
        contract.TRAIN: Phase.TRAINING,
        contract.CONSOLIDATE: Phase.CONSOLIDATING,
        contract.MERGE: Phase.MERGING,
        contract.EVALUATE: Phase.EVALUATING,
        contract.PUBLISH: Phase.PUBLISHING,
    }
)
"""The phase shown while a stage is the current one."""
