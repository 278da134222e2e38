"""What the operator and the stages agree on: names, paths, stage.json, digests, reports and exit codes.

Both sides import this module, so it holds the standard library only and does no I/O but reading a file it is given.
The operator writes stage.json and reads reports; a stage reads stage.json and writes one report. Nothing else passes
between them but the artifacts on the workspace volume.

stage.json (an immutable ConfigMap, mounted at CONFIG_PATH) is one JSON object:

    contractVersion  int     CONTRACT_VERSION of the operator that wrote it
    stage            str     one of STAGES
    image            str     image reference of the stage, tagged by content
    spec             object  the part of the FineTuneJob's spec that the stage reads, defaults filled in; compile has
                             all that train has, for it runs train's program, and its digest covers graph_spec of it
    inputs           object  input name -> {"path": workspace-relative folder, "digest": "sha256:<hex>" of its manifest}
                             (train's "compile" says that its graphs are compiled, and is not part of its digest)
    parallelism      object  numNodes, procsPerNode, worldSize, tensorParallelSize, pipelineParallelSize,
                             dataParallelSize, microBatchSize, gradientAccumulationSteps, globalBatchSize, all counts,
                             and strategy, ddp or fsdp (prepare gets globalBatchSize only)
    output           str     workspace-relative folder of the stage's artifact; volatile, for the digest names it
    job              object  volatile: namespace, name, uid of the FineTuneJob
    attempt          int     volatile: 1 for the first Job of this stage and digest
    workspace        str     volatile: where the workspace volume is mounted
    secrets          object  volatile: secret name -> path of a mounted file
    rendezvous       str     volatile: host:port where a distributed stage's ranks meet, "" for one process group
    progress         object  volatile: {"url", "tokenPath", "caPath"} of the operator's endpoint, when it has one
    history          object  volatile: what the operator knows of the job so far, for its report (operator's
                             core/history.py says what is in it); absent before there is a result to report of
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

CONTRACT_VERSION = 1

PREPARE = "prepare"
COMPILE = "compile"
TRAIN = "train"
CONSOLIDATE = "consolidate"
MERGE = "merge"
EVALUATE = "evaluate"
PUBLISH = "publish"
STAGES = (PREPARE, COMPILE, TRAIN, CONSOLIDATE, MERGE, EVALUATE, PUBLISH)
"""Every stage in the order in which a job runs them."""
REPORTING = frozenset({CONSOLIDATE, MERGE, EVALUATE, PUBLISH})
"""Stages after which there is something to report of: each leaves the job's report.html, and gets its `history`."""

MODEL_INPUT = "model"
DATASET_INPUT = "dataset"
"""Names of the two shared artifacts that prepare reports beside its own."""

CONFIG_PATH = "/etc/finetune/stage.json"
SECRETS_PATH = "/etc/finetune/secrets"
PROGRESS_PATH = "/etc/finetune/progress"
WORKSPACE_PATH = "/workspace"
TERMINATION_PATH = "/dev/termination-log"
SCRATCH_PATH = "/tmp"

MODEL_TOKEN_SECRET = "model-token"
DATASET_TOKEN_SECRET = "dataset-token"
"""Keys of stage.json's `secrets`: bearer tokens for the model's and the dataset's hub."""

NODE_RANK_ENV = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in the pods of an Indexed Job; the node rank of a distributed stage."""
TERMINATION_PATH_ENV = "FINETUNE_TERMINATION_PATH"
"""Overrides TERMINATION_PATH where a stage runs outside a pod."""
COLLECTIVE_TIMEOUT_ENV = "FINETUNE_COLLECTIVE_TIMEOUT_SECONDS"
"""How long a rank of train waits for its peers before it ends with reason CollectiveTimeout, where 600 do not fit."""
RENDEZVOUS_PORT = 29400

WORKSPACE_ROOT = "finetune"
"""Folder of the workspace volume that holds everything this product writes."""
MODELS_FOLDER = f"{WORKSPACE_ROOT}/models"
DATASETS_FOLDER = f"{WORKSPACE_ROOT}/datasets"
JOBS_FOLDER = f"{WORKSPACE_ROOT}/jobs"
NEURON_CACHE_FOLDER = f"{WORKSPACE_ROOT}/neuron-cache"
"""Graphs compiled for AWS Trainium, shared by all jobs. Letters, digits, `_`, `-` and `/` only: optimum-neuron 0.4.5
ends a path in NEURON_CC_FLAGS at any other character (utils/cache_utils.py)."""
MANIFEST_NAME = "manifest.json"

PROGRESS_AUDIENCE = "finetune-operator"
"""Audience of the projected service account token that a stage posts its progress with."""

REPORT_MAX_BYTES = 4096
"""Kubernetes cuts a termination message at 4096 bytes."""

_VOLATILE = frozenset({"output", "job", "attempt", "workspace", "secrets", "rendezvous", "progress", "history"})

_ORDER_ONLY: Mapping[str, frozenset[str]] = {TRAIN: frozenset({COMPILE})}
"""Inputs that a stage waits for and that change nothing in what it writes: training ends with the same weights whether
its graphs were compiled before or on the way, so its checkpoints must outlive another compilation."""

EVALUATE_EVERY = "evaluateEverySteps"
WARMUP_STEPS = "warmupSteps"
_NOT_OF_THE_GRAPHS = frozenset(
    {
        "maxSteps",
        "epochs",
        "learningRate",
        "learningRateSchedule",
        "seed",
        "checkpointEverySteps",
        "keepCheckpoints",
        "logEverySteps",
    }
)
"""Fields of spec.training that reach the devices as data or not at all. Weight decay and clipping stay: with 0 or 1 the
graph is another one, since torch_xla makes constants of these two numbers and inputs of all others."""


class ExitCode(IntEnum):
    """Exit codes of every stage. A code not listed is a bug or a signal, and is classified by the operator."""

    SUCCESS = 0
    BUG = 1
    """An unexpected exception; Python's own code for it."""
    USER_ERROR = 20
    """The spec or the data is wrong; trying again cannot help."""
    RETRYABLE = 21
    """Something outside failed: network, a peer, storage."""
    OUT_OF_HOST_MEMORY = 22
    OUT_OF_DEVICE_MEMORY = 23
    CORRUPT_ARTIFACT = 24
    """An input or a checkpoint is damaged and there is no older one to use instead."""
    INTERRUPTED = 25
    """SIGTERM arrived and a checkpoint was written; the next attempt goes on from it."""


class ContractError(ValueError):
    """stage.json or a report does not have the form this module describes."""


@dataclass(frozen=True)
class ArtifactRef:
    """One complete artifact: its folder relative to the workspace's mount, and its manifest's digest."""

    path: str
    digest: str

    def as_json(self) -> dict[str, str]:
        return {"path": self.path, "digest": self.digest}

    @classmethod
    def from_json(cls, value: Any, where: str) -> ArtifactRef:
        """Parse {"path", "digest"}; ContractError names `where` when it is something else."""
        if (
            not isinstance(value, Mapping)
            or not isinstance(value.get("path"), str)
            or not is_digest(value.get("digest"))
        ):
            raise ContractError(f"{where} must be an object with path and digest sha256:<64 hex>, got {value!r}")
        return cls(path=value["path"], digest=value["digest"])


@dataclass(frozen=True)
class StageConfig:
    """stage.json, parsed. See the module's docstring for each field."""

    stage: str
    image: str
    spec: Mapping[str, Any]
    output: str
    inputs: Mapping[str, ArtifactRef] = field(default_factory=dict)
    parallelism: Mapping[str, int | str] = field(default_factory=dict)
    job: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    workspace: str = WORKSPACE_PATH
    secrets: Mapping[str, str] = field(default_factory=dict)
    rendezvous: str = ""
    progress: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of stage.json, contract version included."""
        return {
            "contractVersion": CONTRACT_VERSION,
            "stage": self.stage,
            "image": self.image,
            "spec": self.spec,
            "inputs": {name: ref.as_json() for name, ref in self.inputs.items()},
            "parallelism": dict(self.parallelism),
            "output": self.output,
            "job": dict(self.job),
            "attempt": self.attempt,
            "workspace": self.workspace,
            "secrets": dict(self.secrets),
            "rendezvous": self.rendezvous,
            "progress": dict(self.progress),
            **({"history": dict(self.history)} if self.history else {}),
        }

    def input(self, name: str) -> ArtifactRef:
        """The input artifact `name`; ContractError when the operator did not pass it."""
        try:
            return self.inputs[name]
        except KeyError:
            raise ContractError(
                f"stage {self.stage} needs input {name!r}, stage.json has {sorted(self.inputs)}"
            ) from None

    @property
    def workspace_path(self) -> Path:
        return Path(self.workspace)

    @property
    def output_path(self) -> Path:
        """Absolute folder of the artifact this stage writes."""
        return self.workspace_path / self.output

    def input_path(self, name: str) -> Path:
        """Absolute folder of the input artifact `name`."""
        return self.workspace_path / self.input(name).path


def parse_stage_config(value: Any) -> StageConfig:
    """StageConfig from stage.json's object; ContractError names the field that is wrong.

    A contract version other than ours is refused: operator and trainer image come from one release.
    """
    if not isinstance(value, Mapping):
        raise ContractError(f"stage.json must be an object, got {type(value).__name__}")
    version = value.get("contractVersion")
    if version != CONTRACT_VERSION:
        raise ContractError(
            f"stage.json has contractVersion {version!r} and this trainer speaks {CONTRACT_VERSION}: "
            "use the operator and the trainer image of one release"
        )
    stage = value.get("stage")
    if stage not in STAGES:
        raise ContractError(f"stage.json: stage is {stage!r}, expected one of {', '.join(STAGES)}")
    for name, kind in (("image", str), ("spec", Mapping), ("output", str)):
        if not isinstance(value.get(name), kind):
            raise ContractError(f"stage.json: {name} must be a {kind.__name__}, got {value.get(name)!r}")
    inputs = value.get("inputs") or {}
    return StageConfig(
        stage=stage,
        image=value["image"],
        spec=value["spec"],
        output=value["output"],
        inputs={name: ArtifactRef.from_json(ref, f"stage.json: inputs.{name}") for name, ref in inputs.items()},
        parallelism=value.get("parallelism") or {},
        job=value.get("job") or {},
        attempt=int(value.get("attempt", 1)),
        workspace=value.get("workspace") or WORKSPACE_PATH,
        secrets=value.get("secrets") or {},
        rendezvous=value.get("rendezvous") or "",
        progress=value.get("progress") or {},
        history=value.get("history") or {},
    )


def load_stage_config(path: str | Path) -> StageConfig:
    """parse_stage_config of the file at `path`; ContractError when it is missing or no JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ContractError(f"cannot read stage config {path}: {error.strerror}") from error
    try:
        return parse_stage_config(json.loads(text))
    except json.JSONDecodeError as error:
        raise ContractError(f"stage config {path} is no JSON: {error}") from error


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal objects give equal bytes. NaN and infinities are refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def is_digest(value: Any) -> bool:
    """True for "sha256:" and 64 lower-case hexadecimal digits."""
    if not isinstance(value, str) or not value.startswith("sha256:"):
        return False
    digits = value[len("sha256:") :]
    return len(digits) == 64 and all(c in "0123456789abcdef" for c in digits)


def digest_of(value: Any) -> str:
    """ "sha256:<hex>" of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def stage_digest(config: StageConfig) -> str:
    """Hex digest that names the stage's Job and output folder.

    It covers everything that can change the output: contract version, stage, image, the spec read, parallelism and the
    digests of the inputs. It leaves out what cannot: the volatile fields, where an input lies, and what only says when
    the stage may begin. Of compile's spec it covers graph_spec.
    """
    stable = {key: value for key, value in config.as_json().items() if key not in _VOLATILE}
    order_only = _ORDER_ONLY.get(config.stage, frozenset())
    stable["inputs"] = {name: ref.digest for name, ref in config.inputs.items() if name not in order_only}
    if config.stage == COMPILE:
        stable["spec"] = graph_spec(config.spec)
    return hashlib.sha256(canonical_json(stable)).hexdigest()


def graph_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of train's spec that decides which graphs its program has.

    Of evaluateEverySteps it is whether there is evaluation at all, of warmupSteps whether there is a first step with a
    rate of 0, which torch_xla makes a constant of. Fields that are not known here are kept: one that changes a graph
    and was left out would be compiled on the accelerators while training waits.
    """
    training = {name: value for name, value in spec.get("training", {}).items() if name not in _NOT_OF_THE_GRAPHS}
    if training.pop(EVALUATE_EVERY, None):
        training["evaluates"] = True
    if training.pop(WARMUP_STEPS, None):
        training["warmsUp"] = True
    return {**spec, "training": training}


def stage_output(namespace: str, job: str, stage: str, digest: str) -> str:
    """Workspace-relative folder of a stage's artifact; `digest` is stage_digest's hex."""
    return f"{JOBS_FOLDER}/{namespace}/{job}/{stage}-{digest[:16]}"


@dataclass(frozen=True)
class Report:
    """What a stage says at its end, in the termination message.

    `artifacts` are complete artifacts by input name (a stage's own under its stage name); `metrics` are plain numbers
    and short strings for status; `reason` is a CamelCase word and `message` a sentence with value and remedy, both
    empty on success; `reused` is true when the artifact was already there.
    """

    stage: str
    exit_code: int
    reason: str = ""
    message: str = ""
    artifacts: Mapping[str, ArtifactRef] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reused: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "contractVersion": CONTRACT_VERSION,
            "stage": self.stage,
            "exitCode": self.exit_code,
            "reason": self.reason,
            "message": self.message,
            "artifacts": {name: ref.as_json() for name, ref in self.artifacts.items()},
            "metrics": dict(self.metrics),
            "reused": self.reused,
        }


def encode_report(report: Report) -> bytes:
    """The report as canonical JSON of at most REPORT_MAX_BYTES.

    A report that is too long loses the end of its message first (marked with an ellipsis), then its metrics; artifacts,
    reason and exit code are never cut. ContractError when those alone do not fit.
    """
    value = report.as_json()
    encoded = canonical_json(value)
    if len(encoded) <= REPORT_MAX_BYTES:
        return encoded
    for keep_metrics in (True, False):
        trial = dict(value, metrics=value["metrics"] if keep_metrics else {})
        room = REPORT_MAX_BYTES - len(canonical_json(dict(trial, message="")))
        if room > 64 or not keep_metrics:
            if room < 0:
                break
            message = report.message
            while message and len(canonical_json(dict(trial, message=message + "…"))) > REPORT_MAX_BYTES:
                message = message[: -max(1, len(message) // 8)]
            return canonical_json(dict(trial, message=message + "…" if message != report.message else message))
    raise ContractError(
        f"a report of stage {report.stage} does not fit {REPORT_MAX_BYTES} bytes even without message and metrics"
    )


def _refuse_constant(word: str) -> Any:
    raise ContractError(f"{word} is no JSON number")


def parse_report(text: str | bytes) -> Report:
    """Report from a termination message; ContractError when it is none of ours (kubelet writes its own words there)."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ContractError(f"the termination message is no report: {error}") from error
    if not isinstance(value, Mapping) or value.get("contractVersion") != CONTRACT_VERSION:
        raise ContractError("the termination message is no report of this contract version")
    if value.get("stage") not in STAGES or not isinstance(value.get("exitCode"), int):
        raise ContractError(f"the report's stage {value.get('stage')!r} or exitCode {value.get('exitCode')!r} is wrong")
    for name in ("artifacts", "metrics"):
        if not isinstance(value.get(name) or {}, Mapping):
            raise ContractError(f"the report's {name} must be an object, got {value[name]!r}")
    artifacts = value.get("artifacts") or {}
    return Report(
        stage=value["stage"],
        exit_code=value["exitCode"],
        reason=str(value.get("reason") or ""),
        message=str(value.get("message") or ""),
        artifacts={name: ArtifactRef.from_json(ref, f"report: artifacts.{name}") for name, ref in artifacts.items()},
        metrics=value.get("metrics") or {},
        reused=bool(value.get("reused")),
    )
