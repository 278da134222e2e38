"""What is known before any pod, and what is told of pods that do not start, on a real API server.

Scheduler, Job controller, quotas and admission are real; the test plays the kubelet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kube
import kubelet
import pytest
import yaml
from builders import make_job
from kubelet import STAGES
from operator_account import Account
from operator_process import OperatorProcess, claim_manifest, make_claim
from submitted import condition, has_phase, stage, submit, wait_for_job

from finetune_operator.core.memory import estimate_memory
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES
from finetune_operator.core.parallelism import derive_parallelism
from finetune_trainer import contract

LLAMA = "hf://meta-llama/Meta-Llama-3-8B"
TRN1 = "ml.trn1.32xlarge"
PRICE = 21.5
NEURON_STAGES = ("prepare", "compile", "train", "consolidate", "merge", "evaluate")
TRAINIUM: dict[str, Any] = {
    "model": {"source": LLAMA},
    "accelerator": {"type": "neuron", "instanceType": TRN1, "nodes": 2},
    "parallelism": {"tensorParallelSize": 8},
    "dataset": {"maxLength": 2048},
    "training": {"gradientAccumulationSteps": 3},
    "stages": {stage: {"nodeSelector": kubelet.NOWHERE} for stage in NEURON_STAGES},
}
"""A job for 64 NeuronCores; prepare's pods have no node."""


@pytest.fixture
def neuron_operator(namespace: str, account: Account, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator of an installation with Trainium and its price."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"currency": "EUR", "instanceTypes": {TRN1: {"pricePerHour": PRICE}}}))
    env = {**account.environment, "FINETUNE_CONFIG_FILE": str(config), "FINETUNE_FEATURE_GATES": "Neuron=true"}
    make_claim(namespace)
    process = OperatorProcess(namespace, tmp_path / "operator.log", **env)
    process.start()
    yield process
    process.stop()


def has_reason(reason: str, words: str = "") -> Any:
    """The job shows the reason, and the words in its message."""
    return lambda job: job.get("status", {}).get("reason") == reason and words in (job["status"].get("message") or "")


def patch_spec(namespace: str, name: str = "tiny", **spec: Any) -> None:
    kube.kubectl("patch", "ftj", name, "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec}))


def jobs(namespace: str) -> list[str]:
    return [job["metadata"]["name"] for job in kube.items("jobs", "-n", namespace)]


def prepared(namespace: str, pod: kube.Object, **metrics: Any) -> str:
    """prepare's report with what it counted and read."""
    report = contract.parse_report(kubelet.report(namespace, pod))
    return contract.encode_report(replace(report, metrics=metrics)).decode()


def test_a_dry_run_plans_a_trainium_job_at_any_time_and_starts_nothing(
    namespace: str, neuron_operator: OperatorProcess
) -> None:
    """With epochs, whose steps prepare counts: hours and price are known after it."""
    submit(namespace, dryRun=True, **{**TRAINIUM, "training": {"maxSteps": None, "epochs": 1, "warmupSteps": 0}})
    job = wait_for_job(namespace, has_reason("DryRun"), reason="the plan")
    status, plan = job["status"], job["status"]["plan"]
    assert (status["phase"], condition(job, "Succeeded")["status"]) == ("Pending", "Unknown")
    assert condition(job, "Validated")["status"] == "True"
    assert [each["name"] for each in plan["stages"]] == list(NEURON_STAGES)
    assert [each["pods"] for each in plan["stages"]] == [1, 2, 2, 1, 1, 1]
    train = plan["stages"][2]
    assert (train["instanceType"], train["requests"]["aws.amazon.com/neuron"]) == (TRN1, "16")
    assert (plan["worldSize"], plan["dataParallelSize"], plan["globalBatchSize"]) == (64, 8, 8)
    estimate = plan["estimate"]
    assert estimate["deviceMemoryGib"] == 16
    assert 0 < estimate["memoryGibPerDevice"] == pytest.approx(sum(estimate["parts"].values()), rel=0.02)
    assert "trainHours" not in estimate
    assert "epochs is a number of steps only after prepare" in estimate["assumptions"]
    assert "Set spec.dryRun to false to start it." in status["message"]
    assert jobs(namespace) == []

    patch_spec(namespace, dryRun=False)
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    assert jobs(namespace) == [plan["stages"][0]["jobName"]]

    patch_spec(namespace, dryRun=True)
    job = wait_for_job(
        namespace,
        lambda job: "Stage prepare goes on" in job["status"].get("plan", {}).get("message", ""),
        reason="the plan of what is left while prepare runs",
    )
    assert job["status"]["phase"] == "Preparing"
    kubelet.bind(namespace, pod)
    kubelet.end(namespace, pod, message=prepared(namespace, pod, maxSteps=100000))
    job = wait_for_job(namespace, has_reason("DryRun"), reason="the plan of what is left")
    plan = job["status"]["plan"]
    assert stage(job, "prepare")["state"] == "Succeeded"
    assert (stage(job, "compile")["state"], stage(job, "compile")["reason"]) == ("Waiting", "DryRun")
    assert [each["name"] for each in plan["stages"]] == list(NEURON_STAGES[1:])
    hours = plan["estimate"]["trainHours"]
    assert plan["cost"]["currency"] == "EUR"
    assert plan["cost"]["amount"] == pytest.approx(hours * 2 * PRICE, rel=0.01)
    assert len(jobs(namespace)) == 1

    patch_spec(namespace, dryRun=False)
    kubelet.pods(namespace, "compile", 1, 2)
    assert plan["stages"][0]["jobName"] in jobs(namespace)
    job = wait_for_job(namespace, has_phase("Compiling"), reason="the compile stage")
    assert "plan" not in job["status"]


REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "processes": (
        {"parallelism": {"tensorParallelSize": 8, "pipelineParallelSize": 3}, "dataset": {"packing": "none"}},
        "InvalidSpec",
        ["2 nodes with 32 processes each are 64", "tensorParallelSize 8 * pipelineParallelSize 3 = 24", "change"],
    ),
    "heads": (
        {"parallelism": {"tensorParallelSize": 64}},
        "InvalidSpec",
        ["tensorParallelSize 64 does not divide the model's attention heads (32)", "use 32"],
    ),
    "memory": (
        {
            "model": {"source": "hf://meta-llama/Meta-Llama-3-70B"},
            "accelerator": {"instanceType": "ml.trn1.2xlarge", "nodes": 1},
            "parallelism": {"tensorParallelSize": 2},
        },
        "InvalidSpec",
        ["the training needs at least", "on each NeuronCore of ml.trn1.2xlarge, 16.0 GiB are there (weights 65.7"],
    ),
    "adapter": (
        {"parallelism": {"tensorParallelSize": 16}},
        "InvalidSpec",
        ["q_proj, v_proj without k_proj", "add k_proj to targetModules, or use tensorParallelSize 8"],
    ),
    "model": (
        {"model": {"source": "hf://mistralai/Mistral-7B-v0.1"}},
        "InvalidSpec",
        ["model type mistral cannot be trained on Trainium", "llama, qwen3, granite (tensor parallelism only)"],
    ),
    "stack": (
        {"accelerator": {"instanceType": "ml.inf2.48xlarge"}, "parallelism": {"tensorParallelSize": 4}},
        "UnsupportedInstanceSdkPair",
        ["ml.inf2.48xlarge with Neuron SDK 2.26.0 is known not to work", "use an instance type of trn1"],
    ),
    "instance": (
        {"accelerator": {"instanceType": "ml.trn9.large"}},
        "UnknownInstanceType",
        ["ml.trn9.large is not known", "instanceTypes in the values of the chart"],
    ),
}


def test_what_cannot_run_is_refused_with_the_numbers_before_any_pod(
    namespace: str, neuron_operator: OperatorProcess
) -> None:
    for name, (spec, _, _) in REFUSED.items():
        submit(namespace, name, **merged(spec))
    for name, (_, reason, words) in REFUSED.items():
        job = wait_for_job(namespace, has_phase("Failed"), reason=f"the refusal of {name}", name=name)
        found = condition(job, "Validated")
        assert (found["status"], found["reason"], job["status"]["reason"]) == ("False", reason, reason)
        assert [each for each in words if each not in found["message"]] == [], found["message"]
    submit(namespace, "planned", dryRun=True, **merged(REFUSED["heads"][0]))
    job = wait_for_job(namespace, has_reason("DryRun"), reason="the plan of a job that is wrong", name="planned")
    assert "It would be refused (InvalidSpec): spec.parallelism.tensorParallelSize: " in job["status"]["message"]
    assert condition(job, "Validated")["reason"] == "InvalidSpec"
    patch_spec(namespace, "planned", parallelism={"tensorParallelSize": 8})
    wait_for_job(
        namespace,
        lambda job: condition(job, "Validated")["status"] == "True",
        reason="the plan of the job that was put right",
        name="planned",
    )
    assert jobs(namespace) == []


def merged(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: {**TRAINIUM.get(key, {}), **spec.get(key, {})} for key in TRAINIUM}


def test_a_model_whose_sizes_prepare_reads_is_refused_before_the_accelerators_are_asked_for(
    namespace: str, neuron_operator: OperatorProcess
) -> None:
    submit(namespace, **{**TRAINIUM, "model": {"source": "workspace:///models/own"}})
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    job = wait_for_job(namespace, lambda job: condition(job, "Validated"), reason="the first status")
    assert condition(job, "Validated")["status"] == "True"
    assert "sizes are not known yet" in condition(job, "Validated")["message"]
    model = {"hiddenSize": 768, "layers": 12, "heads": 12, "kvHeads": 12, "intermediateSize": 3072, "vocabSize": 50257}
    kubelet.end(namespace, pod, message=prepared(namespace, pod, model={**model, "parameters": 124_000_000}))
    job = wait_for_job(namespace, has_phase("Failed"), reason="the refusal")
    assert job["status"]["reason"] == "InvalidSpec"
    assert "tensorParallelSize 8 does not divide the model's attention heads (12)" in job["status"]["message"]
    assert len(jobs(namespace)) == 1, "prepare's, and no compile"


def test_without_trainium_a_dry_run_still_plans_and_says_that_the_job_would_be_refused(
    namespace: str, operator: OperatorProcess
) -> None:
    submit(namespace, dryRun=True, **TRAINIUM)
    job = wait_for_job(namespace, has_reason("DryRun"), reason="the plan")
    assert condition(job, "Validated")["reason"] == "FeatureNotAvailable"
    assert "It would be refused (FeatureNotAvailable): " in job["status"]["message"]
    assert len(job["status"]["plan"]["stages"]) == len(NEURON_STAGES)
    assert jobs(namespace) == []


def test_a_doubt_about_memory_is_shown_and_stops_nothing(namespace: str, operator: OperatorProcess) -> None:
    training = {"accelerator": {"type": "cpu", "nodes": 1}, "dataset": {"maxLength": 2048}}
    spread = derive_parallelism(
        num_nodes=1, procs_per_node=1, tp_size=1, pp_size=1, micro_batch_size=1, gradient_accumulation_steps=1
    )
    estimate = estimate_memory(make_job(**training).spec, spread, BUILT_IN_SHAPES["qwen/qwen2.5-0.5b"])
    limit = {"memory": str(int(estimate.least + estimate.total) // 2)}
    overrides = {**kubelet.OVERRIDES, "train": {"resources": {"limits": limit}}}
    submit(namespace, model={"source": "hf://Qwen/Qwen2.5-0.5B"}, stages=overrides, **training)
    kubelet.pods(namespace, "prepare", 1)
    job = wait_for_job(namespace, lambda job: condition(job, "Validated"), reason="the first status")
    found = condition(job, "Validated")
    assert found["status"] == "True"
    assert "The training may need" in found["message"]
    assert "lower training.microBatchSize or dataset.maxLength" in found["message"]


def test_claim_key_and_quota_are_looked_at_before_any_pod(namespace: str, operator: OperatorProcess) -> None:
    make_quota(namespace, cpu="700m")  # before the operator looks for the first time: it believes a list for 5 seconds
    lone = claim_manifest(namespace, "lone")
    lone["spec"]["accessModes"] = ["ReadWriteOnce"]
    kube.apply(lone)
    submit(namespace, "shared", workspace={"claimName": "lone"})
    job = wait_for_job(namespace, has_reason("ClaimNotShared"), reason="the claim's access mode", name="shared")
    assert condition(job, "StorageReady")["status"] == "False"
    assert "has access mode ReadWriteOnce, and the 2 nodes" in job["status"]["message"]
    kube.kubectl("delete", "ftj", "shared", "-n", namespace)

    kube.kubectl("create", "secret", "generic", "hub", "-n", namespace, "--from-literal=other=x")
    submit(namespace, "gated", model={"source": "hf://org/gated", "tokenSecretRef": {"name": "hub", "key": "token"}})
    job = wait_for_job(namespace, has_reason("SecretMissing"), reason="the missing key", name="gated")
    assert f"Secret hub in namespace {namespace} has no key token: add it" in job["status"]["message"]
    kube.kubectl("delete", "ftj", "gated", "-n", namespace)

    submit(namespace)
    job = wait_for_job(namespace, has_reason("QuotaExceedsMax"), reason="a quota that is too small for train")
    assert "Stage train asks for cpu 1 in 2 pods, and ResourceQuota team" in job["status"]["message"]
    assert "allows 0.7 in all" in job["status"]["message"]
    assert job["status"]["phase"] == "Pending"

    take_cpu(namespace, "600m")
    make_quota(namespace, cpu="1")
    job = wait_for_job(namespace, has_reason("QuotaExceeded"), reason="a quota that others use")
    assert "Stage prepare asks for cpu 0.5; of ResourceQuota team" in job["status"]["message"]
    assert "0.6 of 1 are used" in job["status"]["message"]
    assert jobs(namespace) == []
    kube.kubectl("delete", "pod", "other", "-n", namespace, "--grace-period=0", "--force")
    kubelet.pods(namespace, "prepare", 1)


def make_quota(namespace: str, **hard: str) -> None:
    """A quota with these entries (`_` for `.`), once its controller has counted what is used."""
    wanted = {name.replace("_", "."): value for name, value in hard.items()}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": namespace}}
    kube.apply({**quota, "spec": {"hard": wanted}})
    kube.wait_for(
        "resourcequota",
        "team",
        "-n",
        namespace,
        until=lambda found: found.get("status", {}).get("hard") == wanted and "used" in found["status"],
        deadline=30,
        reason="the quota to be counted",
    )


def take_cpu(namespace: str, cpu: str) -> None:
    """A pod of somebody else that counts against the quota."""
    container = {"name": "other", "image": "example.invalid/other", "resources": {"requests": {"cpu": cpu}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other", "namespace": namespace}}
    kube.apply({**pod, "spec": {"nodeSelector": kubelet.NOWHERE, "containers": [container]}})


def test_pods_that_a_quota_refuses_later_are_told_in_the_api_servers_words(
    namespace: str, operator: OperatorProcess
) -> None:
    """A LimitRange gives the pods a limit of which the quota has too little: no one sees that before they are made."""
    item = {"type": "Container", "default": {"cpu": "2"}}
    limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "defaults", "namespace": namespace}}
    kube.apply({**limits, "spec": {"limits": [item]}})
    make_quota(namespace, limits_cpu="1")
    submit(namespace)
    job = wait_for_job(namespace, has_reason("QuotaExceeded"), reason="the quota's words")
    message = condition(job, "DataPrepared")["message"]
    assert "cannot start (FailedCreate)" in message
    assert "exceeded quota: team, requested: limits.cpu=2, used: limits.cpu=0, limited: limits.cpu=1" in message
    assert "Raise the quota of the namespace" in message
    assert (job["status"]["phase"], stage(job, "prepare")["state"]) == ("Preparing", "Starting")
    make_quota(namespace, limits_cpu="2")
    kubelet.pods(namespace, "prepare", 1, deadline=60)


@pytest.fixture
def volume(namespace: str) -> Iterator[str]:
    """A bound claim, so that the scheduler speaks of nodes."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "capacity": {"storage": "1Gi"},
        "storageClassName": "",
        "claimRef": {"namespace": namespace, "name": "bound"},
        "hostPath": {"path": "/nowhere"},
    }
    kube.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace}, "spec": spec})
    make_claim(namespace, "bound")
    yield "bound"
    kube.kubectl("delete", "pv", namespace, "--wait=false")


def test_a_pod_that_does_not_start_is_told_in_the_words_of_scheduler_and_kubelet(
    namespace: str, volume: str, operator: OperatorProcess
) -> None:
    submit(namespace, workspace={"claimName": volume})
    (pod,) = kubelet.pods(namespace, "prepare", 1)
    job = wait_for_job(namespace, has_reason("Unschedulable"), reason="the scheduler's words")
    assert "nodes are available" in job["status"]["message"]
    assert "change resources, nodeSelector or tolerations of stages.prepare" in job["status"]["message"]

    kubelet.bind(namespace, pod)
    kubelet.hold(namespace, pod, "ContainerCreating")
    kubelet.warn(namespace, pod, "FailedMount", 'MountVolume.SetUp failed for volume "fsx": mount.lustre: no route')
    job = wait_for_job(namespace, has_reason("MountFailed"), reason="the kubelet's event")
    assert "on node no-such-node cannot start (FailedMount): MountVolume.SetUp failed" in job["status"]["message"]
    assert condition(job, "StorageReady")["reason"] == "MountFailed"

    kubelet.hold(namespace, pod, "ImagePullBackOff", 'Back-off pulling image "example.invalid/finetune-trainer"')
    job = wait_for_job(namespace, has_reason("ImagePullFailed"), reason="the image")
    assert "Back-off pulling image" in job["status"]["message"]
    assert condition(job, "StorageReady")["status"] == "True"

    kubelet.end(namespace, pod)
    kubelet.walk(namespace, *STAGES[1:])
    job = wait_for_job(namespace, has_phase("Succeeded"), reason="the job to succeed")
    assert job["status"]["cost"]["podSeconds"] >= 10, "prepare had its node for so long"
    assert "amount" not in job["status"]["cost"], "nobody has said what a node costs"
