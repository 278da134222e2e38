"""FineTuneJobs at moments of their lives as the operator would report them, for tests of the client's screens.

Every status is derived by the operator's own core (tests/simulated.py), so a screen is never tested on a status that
no operator writes. NOW is two minutes after the last thing that happens in each.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from builders import job_body
from fake_api import FakeApi
from simulated import SETTINGS, START, Simulation
from workloads import pending, workload

from finetune_client.job import Job
from finetune_client.offline import plan_offline
from finetune_operator.api.constants import Reason
from finetune_operator.core.failure import Waiting
from finetune_operator.core.figures import Progress
from finetune_operator.core.preflight import Findings
from finetune_operator.core.stages import derive_pipeline
from finetune_operator.core.status import derive_status, planned_status, refused_status
from finetune_trainer.contract import ExitCode, Report, encode_report

NAME = "llama3-8b-dolly"
WISH: dict[str, Any] = {
    "model": {"source": "hf://meta-llama/Meta-Llama-3-8B"},
    "dataset": {"source": "hf://databricks/databricks-dolly-15k", "maxLength": 2048},
    "training": {"maxSteps": 1200, "checkpointEverySteps": 100},
}
_HEALTH = "sagemaker.amazonaws.com/node-health-status"
LOG = (
    "[2026-01-02 03:24:05] step 412 loss 1.832 tokens/s 9120",
    "Traceback (most recent call last):",
    '  File "/opt/finetune/lib/python3.11/site-packages/finetune_trainer/training.py", line 311, in train',
    "    loss.backward()",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total capacity of 22.06 GiB "
    "of which 912.00 MiB is free.",
)


def body(**spec: Any) -> dict[str, Any]:
    return job_body(name=NAME, namespace="research", **{**WISH, **spec})


def now_of(simulation: Simulation) -> datetime:
    return simulation.now + timedelta(seconds=120)


def _simulation(**spec: Any) -> Simulation:
    simulation = Simulation(body=body(**spec))
    simulation.nodes = {name: _node(name) for name in ("hyperpod-i-0a1", "hyperpod-i-0b2", "hyperpod-i-0c3")}
    simulation.settle()
    return simulation


def _node(name: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": f"uid-of-{name}", "labels": {_HEALTH: "Schedulable"}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def _run(simulation: Simulation, stage: str, nodes: tuple[str, ...] = ("hyperpod-i-0a1", "hyperpod-i-0b2")) -> None:
    """The stage's pods run, one a node."""
    for pod, node in zip(simulation.pods_of(stage), nodes, strict=False):
        simulation.pods[pod["metadata"]["name"]]["spec"]["nodeName"] = node
        pod["status"].update(
            phase="Running", containerStatuses=[{"name": "stage", "state": {"running": {}}}], startTime=None
        )
    simulation.settle()


def _prepared(**spec: Any) -> Simulation:
    simulation = _simulation(**spec)
    _run(simulation, "prepare")
    simulation.settle(95)
    simulation.run_stage("prepare", maxSteps=1200)
    simulation.settle()
    return simulation


def _step(simulation: Simulation, attempt: int, step: int, checkpoint: int, left: float) -> None:
    simulation.progress = Progress(
        "train",
        attempt,
        step=step,
        total_steps=1200,
        loss=1.8321 - step / 2000,
        tokens_per_second=9120.4,
        checkpoint_step=checkpoint,
        checkpoint_time=simulation.now - timedelta(seconds=200),
        seconds_left=left,
        mfu=0.31,
        advanced_at=simulation.now,
    )


def running() -> Simulation:
    """The second attempt of a training runs, after a node's fault that cost no step."""
    simulation = _prepared()
    _run(simulation, "train")
    simulation.settle(600)
    _step(simulation, 1, 300, 300, 7000)
    simulation.settle(10)
    simulation.nodes["hyperpod-i-0b2"]["metadata"]["labels"][_HEALTH] = "UnschedulablePendingReplacement"
    simulation.settle()
    simulation.settle(40)
    _run(simulation, "train", ("hyperpod-i-0a1", "hyperpod-i-0c3"))
    simulation.settle(900)
    _step(simulation, 2, 760, 700, 2640)
    simulation.settle()
    return simulation


def retrying() -> Simulation:
    """An attempt of a training ended by a fault of storage; the next one follows."""
    simulation = _prepared()
    _run(simulation, "train")
    simulation.settle(600)
    _step(simulation, 1, 345, 300, 7000)
    simulation.settle(10)
    said = Report("train", ExitCode.RETRYABLE, reason="S3Unavailable", message="s3://bucket/x: 503 Slow Down")
    simulation.fail_stage("train", ExitCode.RETRYABLE, encode_report(said).decode())
    simulation.settle()
    return simulation


def failed() -> Simulation:
    """The training needed more memory than the device has: not tried again."""
    simulation = _prepared()
    _run(simulation, "train")
    simulation.settle(1500)
    _step(simulation, 1, 412, 400, 2900)
    simulation.settle()
    said = Report(
        "train",
        ExitCode.OUT_OF_DEVICE_MEMORY,
        reason="OutOfDeviceMemory",
        message="rank 1 of 2 asked for 1.2 GiB more, 0.9 of 22.1 GiB were free",
    )
    simulation.fail_stage("train", ExitCode.OUT_OF_DEVICE_MEMORY, encode_report(said).decode(), index=1)
    simulation.settle(20)
    status = simulation.body["status"]
    for shown in (status["stages"][1], status["attempts"][0]):
        shown["log"] = list(LOG)
    return simulation


def exhausted() -> Simulation:
    """A training failed more often than it may, always for another node's silence."""
    simulation = _prepared(retryPolicy={"maxRetries": 1})
    for attempt, step in ((1, 120), (2, 260)):
        _run(simulation, "train")
        simulation.settle(300)
        _step(simulation, attempt, step, step // 100 * 100, 9000)
        simulation.settle()
        said = Report("train", ExitCode.RETRYABLE, reason="PeerLost", message="rank 0 lost rank 1 in all_reduce 811")
        simulation.fail_stage("train", ExitCode.RETRYABLE, encode_report(said).decode())
        simulation.settle(100)
    simulation.settle(200)
    return simulation


def data_wrong() -> Simulation:
    """prepare found records that cannot be used."""
    simulation = _simulation()
    _run(simulation, "prepare")
    simulation.settle(30)
    said = Report(
        "prepare",
        ExitCode.USER_ERROR,
        reason="RecordsRejected",
        message="3 of 15011 records cannot be used, maxRejectedPercent 0 allows 0: data.jsonl line 17: field response "
        "is empty; line 92: 3071 tokens, maxLength is 2048; line 4411: field instruction is missing",
    )
    simulation.fail_stage("prepare", ExitCode.USER_ERROR, encode_report(said).decode())
    simulation.settle()
    return simulation


def _finished(**evaluation: Any) -> Simulation:
    simulation = _prepared(evaluate={"gate": {"maxLossRatioToBase": 0.9}, "prompts": [{"text": "Who are the Smiths?"}]})
    _run(simulation, "train")
    simulation.settle(5400)
    figures = {
        "step": 1200,
        "totalSteps": 1200,
        "loss": 1.2034,
        "tokensPerSecond": 9104.2,
        "trainableParameters": 6815744,
    }
    simulation.run_stage("train", **figures)
    simulation.settle()
    for stage, seconds in (("consolidate", 20), ("merge", 75)):
        simulation.settle(seconds)
        simulation.run_stage(stage)
        simulation.settle()
    simulation.settle(130)
    answers = {"prompt": "Who are the Smiths?", "base": "A family name.", "tuned": "A rock band from Manchester."}
    simulation.run_stage("evaluate", prompts=[answers], **evaluation)
    simulation.settle()
    return simulation


def finished() -> Simulation:
    """Every stage has its artifact, and the tuned model is better."""
    answers = {"baseExactMatch": 0.0, "tunedExactMatch": 0.75, "baseRougeL": 0.1213, "tunedRougeL": 0.8342}
    return _finished(baseLoss=1.9412, tunedLoss=1.3107, promptsCompared=4, **answers)


def gate_missed() -> Simulation:
    """Every stage ran, and the tuned model is not good enough."""
    return _finished(baseLoss=1.9412, tunedLoss=1.9207)


def queued() -> Simulation:
    """Kueue holds the first stage back."""
    simulation = Simulation(body=body(queue={"name": "hyperpod-ns-research-localqueue"}), kueue_installed=True)
    simulation.settle()
    (job,) = simulation.jobs.values()
    simulation.pods.clear()  # a suspended Job has none
    words = (
        "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor ml.trn1.32xlarge, "
        "119 more needed"
    )
    simulation.workloads[job["metadata"]["uid"]] = workload(pending(words))
    simulation.settle(30)
    return simulation


def waiting() -> Simulation:
    """The workspace's claim is not there."""
    simulation = Simulation(body=body())
    job, observed = simulation.job, simulation.observe()
    pipeline = derive_pipeline(job, observed, simulation.settings, simulation.now)
    problem = Waiting(
        Reason.CLAIM_MISSING,
        "PersistentVolumeClaim workspace does not exist in namespace research: make it, ReadWriteMany.",
    )
    status = derive_status(job, observed, pipeline, simulation.now, problem=problem)
    simulation.body["status"] = status.as_json()
    return simulation


def suspended() -> Simulation:
    """Held by its user after its preparation."""
    simulation = _prepared()
    simulation.body["spec"]["suspend"] = True
    simulation.body["metadata"]["generation"] += 1
    simulation.settle(5)
    simulation.settle(5)
    return simulation


def refused() -> Simulation:
    """A spec that only the operator could find wrong."""
    simulation = Simulation(body=body())
    message = (
        "spec.accelerator.nodes: 2 nodes of ml.trn1.2xlarge cannot train together: it has no EFA interface, which "
        "collectives between Trainium nodes need; use 1 node, or an instanceType with EFA such as ml.trn1.32xlarge"
    )
    status = refused_status(simulation.job.status, 1, Reason.INVALID_SPEC, message, simulation.now)
    simulation.body["status"] = status.as_json()
    return simulation


def _planned(length: int) -> Simulation:
    spec = {
        "accelerator": {"type": "cuda", "instanceType": "ml.g5.12xlarge", "nodes": 2},
        "dataset": {**WISH["dataset"], "maxLength": length},
        "dryRun": True,
    }
    simulation = Simulation(body=body(**spec))
    instances = dict(SETTINGS.instance_types)
    instances["ml.g5.12xlarge"] = replace(instances["ml.g5.12xlarge"], price_per_hour=7.09)
    settings = replace(SETTINGS, instance_types=instances, features={"Cuda": True, "Neuron": False, "Publish": False})
    plan = plan_offline(simulation.body, settings, START)
    refusal = re.search(r"It would be refused \((\w+)\): (.*)\.", plan.message)
    findings = Findings() if refusal is None else Findings(Waiting(Reason(refusal[1]), refusal[2]))
    simulation.body["status"] = planned_status(simulation.job, plan, findings, START).as_json()
    return simulation


def planned() -> Simulation:
    """A dry run of a job for two g5 nodes, with a price."""
    return _planned(512)


def planned_too_large() -> Simulation:
    """A dry run of the same with rows that do not fit."""
    return _planned(2048)


def new() -> Simulation:
    """Just submitted."""
    return Simulation(body=body())


MOMENTS: dict[str, Callable[[], Simulation]] = {
    each.__name__: each
    for each in (
        running,
        retrying,
        failed,
        exhausted,
        data_wrong,
        finished,
        gate_missed,
        queued,
        waiting,
        suspended,
        refused,
        planned,
        planned_too_large,
        new,
    )
}


@cache
def _made(moment: str) -> tuple[dict[str, Any], datetime]:
    simulation = MOMENTS[moment]()
    return simulation.body, now_of(simulation)


def job_at(moment: str) -> tuple[Job, datetime]:
    """The job at one of MOMENTS, its object a copy that may be changed, and the time then."""
    made, now = _made(moment)
    return Job(copy.deepcopy(made)), now


def there(api: FakeApi, moment: str, **changes: Any) -> dict[str, Any]:
    """The job of that moment is in the cluster."""
    job = copy.deepcopy(dict(job_at(moment)[0].raw))
    job["spec"].update(changes)
    return api.put(job)


def status_at(moment: str, generation: int = 1) -> dict[str, Any]:
    """The status of that moment, of this generation of the spec."""
    status: dict[str, Any] = copy.deepcopy(job_at(moment)[0].raw["status"])
    status["observedGeneration"] = generation
    for condition in status["conditions"]:
        condition["observedGeneration"] = generation
    status.pop("specDigest", None)
    return status
