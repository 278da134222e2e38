"""What every stage's program does around the stage itself: arguments, reuse, report, exit code.

__main__ calls main(). It imports only the stage that is asked for, so that merge and consolidate never wait for what
they do not use. A stage module has one function, run(config) -> Report, which writes its artifact with new_artifact,
calls keep_report inside, and returns finished_report.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from finetune_trainer import contract
from finetune_trainer.artifacts import ArtifactWriter, artifact_ref, find_artifact, read_manifest, remove_artifact
from finetune_trainer.contract import ArtifactRef, ContractError, ExitCode, Report, StageConfig
from finetune_trainer.errors import DeviceOutOfMemory, HostOutOfMemory, RetryableError, StageError, UserError
from finetune_trainer.neuron_cache import is_still_compiled
from finetune_trainer.neuron_checks import check_neuron_stage
from finetune_trainer.spec_checks import Problem, check_parallelism, check_part

VOLATILE_METRICS = frozenset({"seconds", "tokensPerSecond", "resumedFromStep"})
"""Metrics that differ between equal runs: for the report only, a manifest's digest must not depend on them."""

_REPORT = "report"
_STORAGE_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.EROFS, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN})
"""What a volume answers that is away; Lustre gives the last two to a client that its server has evicted."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_SPACE = os.strerror(errno.ENOSPC)
"""What is left of the error of a library that turns its errors into its own, as those not written in Python do."""
_SECRET_WORDS = ("token", "password", "secret", "credential")


def keep_report(
    writer: ArtifactWriter,
    metrics: Mapping[str, Any],
    artifacts: Mapping[str, ArtifactRef] | None = None,
    verdict: StageError | None = None,
) -> None:
    """Store in the artifact what its report will say, so that a later run of the finished stage can say it again.

    `artifacts` are the ones beside the stage's own (prepare: model and dataset). VOLATILE_METRICS are left out.
    `verdict` is for a stage that did its work and still ends the job, as a gate that is not passed does.
    """
    writer.metadata[_REPORT] = {
        "artifacts": {name: ref.as_json() for name, ref in (artifacts or {}).items()},
        "metrics": {name: value for name, value in metrics.items() if name not in VOLATILE_METRICS},
    }
    if verdict is not None:
        writer.metadata[_REPORT]["verdict"] = {
            "exitCode": int(verdict.exit_code),
            "reason": verdict.reason,
            "message": verdict.message,
        }


def finished_report(config: StageConfig, metrics: Mapping[str, Any] | None = None, *, reused: bool = False) -> Report:
    """The report of the complete artifact at config.output: what keep_report stored, and `metrics` on top."""
    kept = read_manifest(config.output_path).metadata.get(_REPORT, {})
    verdict = kept.get("verdict", {})
    artifacts = {
        name: ArtifactRef.from_json(ref, f"{config.output}: report artifact {name}")
        for name, ref in kept.get("artifacts", {}).items()
    }
    return Report(
        stage=config.stage,
        exit_code=verdict.get("exitCode", ExitCode.SUCCESS),
        reason=verdict.get("reason", ""),
        message=verdict.get("message", ""),
        artifacts={**artifacts, config.stage: artifact_ref(config.workspace_path, config.output_path)},
        metrics={**kept.get("metrics", {}), **(metrics or {})},
        reused=reused,
    )


def reusable_report(config: StageConfig) -> Report | None:
    """The report of an earlier run when its artifact, and every artifact it names, still is complete; None otherwise.

    A stage's artifact whose companions are gone (a shared model was deleted, compiled graphs were) is removed, since it
    describes them.
    """
    if find_artifact(config.output_path) is None:
        return None
    report = finished_report(config, reused=True)
    for name, ref in report.artifacts.items():
        manifest = find_artifact(config.workspace_path / ref.path)
        if manifest is None or manifest.digest != ref.digest:
            print(
                f"{config.output} is complete but its {name} ({ref.path}) is not: running the stage again", flush=True
            )
            remove_artifact(config.output_path)
            return None
    if config.stage == contract.COMPILE and not is_still_compiled(config, os.environ):
        print(f"{config.output} is complete but its graphs are not in the cache: running the stage again", flush=True)
        remove_artifact(config.output_path)
        return None
    return report


def check_config(config: StageConfig) -> None:
    """UserError with everything that is wrong with the stage's part of the spec and its sizes; before any work."""
    cut = ("training",) if config.stage == contract.PREPARE else ()
    refuse([*check_part(config.spec, cut), *check_parallelism(config.parallelism)])
    if config.stage in (contract.COMPILE, contract.TRAIN):
        refuse(check_neuron_stage(config, os.environ))


def refuse(problems: Sequence[Problem]) -> None:
    """UserError InvalidSpec that lists all `problems`; nothing where there are none."""
    if problems:
        raise UserError("InvalidSpec", "; ".join(str(problem) for problem in problems))


def describe(config: StageConfig) -> str:
    """The resolved arguments as indented JSON for the log, with anything that could be a secret masked."""
    value = config.as_json()
    value["secrets"] = dict.fromkeys(config.secrets, "(mounted file)")
    return json.dumps(_masked(value), indent=2, sort_keys=True, ensure_ascii=False)


def write_report(report: Report) -> None:
    """Write the report as the container's termination message; a place that cannot be written is said, not raised."""
    path = Path(os.environ.get(contract.TERMINATION_PATH_ENV) or contract.TERMINATION_PATH)
    try:
        path.write_bytes(contract.encode_report(report))
    except OSError as error:
        print(f"cannot write the report to {path}: {error.strerror}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage: parse, print, run, report. Returns the exit code; only a wrong command line ends it otherwise."""
    parser = argparse.ArgumentParser(prog="finetune-trainer", description="Run one stage of a FineTuneJob.")
    parser.add_argument("stage", choices=contract.STAGES)
    parser.add_argument("--config", default=contract.CONFIG_PATH, help="stage.json (default: %(default)s)")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        report = _run(arguments.stage, arguments.config)
    except Exception as error:  # noqa: BLE001 - the last line of defence: every failure becomes a report
        report = failure_report(arguments.stage, error)
    report = dataclasses.replace(report, metrics={**report.metrics, "seconds": round(time.monotonic() - started, 3)})
    print(contract.canonical_json(report.as_json()).decode(), flush=True)
    write_report(report)
    return report.exit_code


def failure_report(stage: str, error: Exception) -> Report:
    """The report of a stage that ended with `error`; prints the traceback of anything that is not a StageError."""
    known = as_stage_error(error)
    if known is None:
        traceback.print_exception(error)
        last_line = traceback.format_exception_only(type(error), error)[-1].strip()
        return Report(stage, ExitCode.BUG, reason="UnexpectedError", message=last_line)
    if known is not error:
        traceback.print_exception(error)
    print(f"{known.reason}: {known.message}", file=sys.stderr, flush=True)
    return Report(stage, known.exit_code, reason=known.reason, message=known.message)


def as_stage_error(error: Exception) -> StageError | None:
    """The StageError that `error` amounts to; None when it is a bug."""
    if isinstance(error, StageError):
        return error
    if isinstance(error, ContractError):
        return UserError("InvalidStageConfig", str(error))
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        # numpy's has the size; Python's own has no words
        what = str(error) or "out of memory"
        return HostOutOfMemory("OutOfHostMemory", f"{what}: raise the memory limit in stages.<name>.resources")
    if type(error).__name__ == "OutOfMemoryError":
        # torch's class, told by name so that stages without torch need not import it
        return DeviceOutOfMemory("OutOfDeviceMemory", f"{error}: lower training.microBatchSize or dataset.maxLength")
    if (isinstance(error, OSError) and error.errno in _FULL) or _NO_SPACE in str(error):
        place = getattr(error, "filename", None) or "a file"
        return RetryableError(
            "VolumeFull",
            f"no space left, or a quota used up, for {place}: enlarge the volume, or remove what jobs that are gone "
            f"left in {contract.JOBS_FOLDER}",
        )
    if isinstance(error, PermissionError):
        return UserError(
            "PermissionDenied", f"{error.strerror}: {error.filename}: let user {os.getuid()} or its group use that path"
        )
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return RetryableError("StorageFailed", f"{error.strerror} at {error.filename or 'a file'}: check the volume")
    return None


def set_environment(stage: str) -> None:
    """Set what libraries read from the environment when they are imported; what is already set stays. Once a process.

    The root file system is read-only and the user has no home, so every cache goes to the scratch folder. Only prepare
    may reach a hub, and it has no use for torch, which transformers would import (seconds, and 0.5 GB of memory).
    """
    scratch = tempfile.gettempdir()
    defaults = {
        "HF_HOME": str(Path(scratch) / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",  # its own network stack: no resume of ours, no proxy settings, caches under HOME
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # threads that spin while they wait made training steps 8 times slower where pods share processors
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
        # peft imports bitsandbytes with every adapter, whose decorators would import torch's whole compiler: seconds
        "TORCHDYNAMO_DISABLE": "1",
        # its default needs a user name, and user 65532 has none
        "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "torchinductor"),
    }
    if stage == contract.MERGE:
        defaults["OPENBLAS_NUM_THREADS"] = "1"  # its own threads share out the work already
    if stage == contract.PREPARE:
        defaults["USE_TORCH"] = "0"
        defaults["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is missing
    else:
        defaults["HF_HUB_OFFLINE"] = "1"
    home = os.environ.get("HOME")
    if not home or not os.access(home, os.W_OK):
        os.environ["HOME"] = scratch
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def end_terminated(_signal: int, _frame: FrameType | None) -> None:
    """Handler of SIGTERM: raises in the main thread, so that temporary folders go and a report is written.

    train replaces it by its own, which writes a checkpoint first.
    """
    raise RetryableError("Terminated", "the pod was asked to stop (SIGTERM) before the stage was done")


def _run(stage: str, config_path: str) -> Report:
    config = contract.load_stage_config(config_path)
    if config.stage != stage:
        raise ContractError(f"stage.json is for stage {config.stage!r}, this process was started as {stage!r}")
    print(f"{stage} attempt {config.attempt}, arguments:\n{describe(config)}", flush=True)
    report = reusable_report(config)
    if report is not None:
        print(f"{config.output} is already complete: nothing to do", flush=True)
        _leave_report(config)
        return report
    check_config(config)
    result: Report = importlib.import_module(f"finetune_trainer.stages.{stage}").run(config)
    _leave_report(config)
    return result


def _leave_report(config: StageConfig) -> None:
    """The job's report.html, where the operator told its history; the libraries for it are imported only then."""
    if config.history:
        importlib.import_module("finetune_trainer.report.reporting").leave_report(config)


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, name) for item in value]
    if isinstance(value, str) and any(word in name.lower() for word in _SECRET_WORDS) and not name.endswith("Path"):
        return "***"
    return value
