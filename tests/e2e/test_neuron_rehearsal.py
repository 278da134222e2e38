"""Neuron's whole path on the local cluster: compile and train on two pods, a node's fault, and all that follows.

Operator, pods and trainer are the real ones; in compile's and train's image tests/rehearsal/Dockerfile puts stand-ins
in the places of the vendor's entry points. docs/architecture.md says what that shows and what it cannot.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import chart_release
import kube
import neuron_node
import pytest
from neuron_node import NeuronNode
from team import (
    LOCAL,
    ROOT,
    TRAINING,
    Team,
    condition,
    failed,
    logged_steps,
    make_sources,
    stage,
    stage_metrics,
    succeeded,
    tiny_job,
    training_pods,
)

from finetune_operator.core.accelerators.instances import NEURON
from finetune_operator.core.accelerators.whole_node import EFA
from finetune_trainer import contract
from finetune_trainer.neuron_environment import neuron_environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

INSTANCE_TYPE = "ml.trn1.32xlarge"
SMALL = {"devices": 1, "coresPerDevice": 2, "efa": 1, "vcpus": 4, "memoryGib": 16}
"""A hundredth of the type, so that the pods of two nodes fit this machine; everything else of it stays."""
NODES = 2
DEVICE_STAGES = {"compile", "train"}
GRAPHS = 4
"""The stand-in's programs: a micro step, an update, one with a learning rate of 0, and the held-out loss."""
STEPS, EVERY, HELD = 80, 20, 50
"""Steps in all, between two checkpoints, and after which the first attempt stands still until its node has a fault."""
HOLD = "hold"
"""File of the workspace that lets it stand still."""


def cluster_py(*arguments: str) -> str:
    command = ["python3", "hack/cluster/cluster.py", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


@pytest.fixture(scope="module")
def rehearsal_image(trainer_image: str) -> str:
    """The trainer image with the stand-ins in it, built where this content is not there yet."""
    if not LOCAL:
        pytest.skip("the rehearsal changes its node's labels and resources: on the local cluster only")
    made_of = ["tests/rehearsal", "tests/neuron_vendor", "tests/neuron_shards.py"]
    name = "localhost/finetune-rehearsal"
    tag = cluster_py("content-tag", *made_of, "--salt", trainer_image)
    dockerfile = ["--file", "tests/rehearsal/Dockerfile", "--context", "tests"]
    argument = ["--build-arg", f"TRAINER_IMAGE={trainer_image}"]
    return cluster_py("build-image", "--name", name, "--tag", tag, *dockerfile, *argument, "--disk-gib", "1")


@pytest.fixture(scope="module")
def trainium(operator_namespace: str, rehearsal_image: str) -> Iterator[NeuronNode]:
    """A node with the devices of NODES small ones, and the operator with the feature on; afterwards as before."""
    repository, tag = rehearsal_image.rsplit(":", 1)
    devices, efa = NODES * SMALL["devices"], NODES * SMALL["efa"]
    with (
        chart_release.installed(operator_namespace) as release,
        neuron_node.dressed(INSTANCE_TYPE, devices=devices, efa=efa) as node,
    ):
        release.upgrade(
            "--set=featureGates.Neuron=true",
            f"--set-json=instanceTypes={json.dumps({INSTANCE_TYPE: SMALL})}",
            f"--set-string=images.neuron.repository={repository}",
            f"--set-string=images.neuron.tag={tag}",
        )
        yield node


def neuron_job(team: Team, name: str, **spec: Any) -> dict[str, Any]:
    """The tiny job on two small Trainium nodes: 4 processes, tensor parallel by 2."""
    room = {
        "resources": {"requests": {"cpu": "500m", "memory": "2Gi"}},
        "env": [{"name": "REHEARSAL_HOLD", "value": f"/workspace/{HOLD} {HELD}"}],
    }
    training = {**TRAINING, "maxSteps": STEPS, "checkpointEverySteps": EVERY, "precision": "bf16", "logEverySteps": 1}
    training |= {"warmupSteps": 2, "evaluateEverySteps": 40, "microBatchSize": 2}
    return tiny_job(
        team,
        name,
        **{
            "accelerator": {"type": "neuron", "instanceType": INSTANCE_TYPE, "nodes": NODES},
            "parallelism": {"tensorParallelSize": 2},
            "training": training,
            "stages": {"train": room},
            **spec,
        },
    )


def pods(team: Team, name: str) -> dict[str, list[dict[str, Any]]]:
    """The pods of a job that are there, by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for pod in kube.items("pods", "-n", team.namespace, "-l", f"finetune-operator.io/job-name={name}"):
        found.setdefault(pod["metadata"]["labels"]["finetune-operator.io/stage"], []).append(pod)
    return found


def devices(pod: dict[str, Any]) -> dict[str, str]:
    """What the pod holds of devices and network interfaces."""
    limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
    return {name: count for name, count in limits.items() if "/" in name}


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in pod["spec"]["containers"][0]["env"]}


def log(team: Team, pod: dict[str, Any]) -> str:
    return kube.kubectl("logs", "-n", team.namespace, pod["metadata"]["name"])


def show(team: Team, name: str) -> str:
    """What a person sees of the job, for the test's output."""
    text = kube.kubectl("get", "ftj", name, "-n", team.namespace)
    print(text)
    return text


def damage(team: Team, pattern: str) -> str:
    """Turn one bit in the middle of the first file that fits; its name. The vendor's own loading does not notice."""
    [path, *_] = team.list_files(pattern)
    team.toolbox(
        f"import os\np = '/workspace/{path}'\nos.chmod(p, 0o644)\n"
        "with open(p, 'r+b') as file:\n"
        "    file.seek(os.path.getsize(p) // 2)\n"
        "    byte = file.read(1)[0]\n"
        "    file.seek(-1, 1)\n"
        "    file.write(bytes([byte ^ 1]))\n"
    )
    return path


def digest_of_file(team: Team, path: str) -> str:
    """sha256 over the tensors of a safetensors file, names, dtypes, shapes and bytes, as the stand-in takes it."""
    return team.toolbox(
        "import hashlib, json, pathlib\n"
        f"data = (pathlib.Path('/workspace') / {path!r}).read_bytes()\n"
        "start = 8 + int.from_bytes(data[:8], 'little')\n"
        "total = hashlib.sha256()\n"
        "for name, info in sorted(json.loads(data[8:start]).items()):\n"
        "    if name != '__metadata__':\n"
        "        begin, end = info['data_offsets']\n"
        '        head = f\'{name} {info["dtype"]} {info["shape"]}\\n\'\n'
        "        total.update(head.encode() + data[start + begin : start + end])\n"
        "print(total.hexdigest())\n"
    ).strip()


def test_a_job_goes_the_whole_way_through_a_nodes_fault_and_a_damaged_checkpoint(
    team: Team, trainium: NeuronNode
) -> None:
    make_sources(team)
    team.write(HOLD, "")
    team.apply(neuron_job(team, "llama"))
    team.wait("llama", lambda job: stage(job, "compile").get("state") == "Succeeded", 240, "compile", unless=failed)
    compiled = stage_metrics(team, "llama", "compile")
    assert compiled["graphs"] == compiled["graphsCompiled"] == GRAPHS
    assert (compiled["cacheHits"], compiled["graphsFailed"]) == (0, 0)

    checkpoints = f"finetune/jobs/{team.namespace}/llama/train-*.work/checkpoints/step-*"
    last = HELD // EVERY * EVERY
    whole = f"{checkpoints[:-1]}{last:08d}/manifest.json"
    kube.eventually(lambda: team.list_files(whole), deadline=240, reason=f"the checkpoint of step {last}")
    show(team, "llama")
    trainium.health("UnschedulablePendingReplacement")
    job = team.wait("llama", lambda job: job["status"].get("attempts"), 5, "the fault to be noticed", unless=failed)
    [attempt] = job["status"]["attempts"]
    assert (attempt["reason"], attempt["node"], attempt["counted"]) == ("NodeFault", trainium.name, False)
    assert "HyperPod labelled the node UnschedulablePendingReplacement" in attempt["message"]
    team.toolbox(f"import os; os.remove('/workspace/{HOLD}')")

    def waits(job: dict[str, Any]) -> bool:
        return stage(job, "train").get("attempt") == 2 and job["status"]["reason"] == "Unschedulable"

    team.wait("llama", waits, 60, "the next attempt's pods to wait for a node", unless=failed)
    show(team, "llama")
    *_, newest = team.list_files(f"{checkpoints}/manifest.json")
    [written] = map(int, re.findall(r"step-(\d+)", newest))
    assert last < written < STEPS, "there was time for another checkpoint"
    damaged = damage(team, f"{newest.removesuffix('manifest.json')}**/model/*.tensors/*.pt")
    trainium.health("Schedulable")  # HyperPod has replaced it
    job = team.wait("llama", succeeded, 300, "the job to succeed", unless=failed)
    show(team, "llama")

    trained = stage_metrics(team, "llama", "train", 2)
    [first, _] = training_pods(team, "llama")
    assert f"step-{written:08d} is damaged and not used" in log(team, first)
    assert damaged.rpartition("/")[2] in log(team, first), "the file is named"
    assert trained["resumedFromStep"] == last, "the newest checkpoint that is whole"
    assert trained["repeatedSteps"] == written - last
    assert trained["graphsCompiled"] == 0
    assert logged_steps(team, job) == list(range(1, STEPS + 1)), "no step is lost or logged twice"
    [attempt] = job["status"]["attempts"]
    assert attempt["lostSteps"] == 0, "as far as the operator can know"
    check_pods(team, "llama")
    parameters = held_parameters(team, "llama")
    [adapter] = team.list_files(f"finetune/jobs/{team.namespace}/llama/consolidate-*/adapter_model.safetensors")
    assert digest_of_file(team, adapter) == parameters, "what consolidate made of the ranks' files, to the bit"
    found = job["status"]["evaluation"]
    assert found["tunedLoss"] < found["baseLoss"]
    check_second_job(team, parameters)


def check_pods(team: Team, name: str) -> None:
    """Compile and train alone hold devices, and both have the whole environment of the table, the same one."""
    found = pods(team, name)
    assert set(found) == {"prepare", "compile", "train", "consolidate", "merge", "evaluate"}
    wanted = {NEURON: str(SMALL["devices"]), EFA: str(SMALL["efa"])}
    for stage_name, of_stage in found.items():
        for pod in of_stage:
            assert devices(pod) == (wanted if stage_name in DEVICE_STAGES else {}), stage_name
    table = neuron_environment(
        INSTANCE_TYPE,
        cores=SMALL["devices"] * SMALL["coresPerDevice"],
        has_efa=True,
        cache_path=f"{contract.WORKSPACE_PATH}/{contract.NEURON_CACHE_FOLDER}",
    )
    environments = [environment(pod) for stage_name in DEVICE_STAGES for pod in found[stage_name]]
    assert table.items() <= environments[0].items()
    assert all(each == environments[0] for each in environments)


def held_parameters(team: Team, name: str) -> str:
    """sha256 of the parameters that the ranks of the last attempt held at the end, as the first of them told it."""
    [first, _] = training_pods(team, name)
    [told] = re.findall(rf"the parameters of step {STEPS} have sha256 (\w+)", log(team, first))
    return str(told)


def check_second_job(team: Team, parameters: str) -> None:
    """The same training in another job, which nothing disturbs: it compiles nothing and ends at the same bits."""
    training = {**neuron_job(team, "again")["spec"]["training"], "logEverySteps": 7, "keepCheckpoints": 1}
    team.apply(neuron_job(team, "again", training=training))
    job = team.wait(
        "again", lambda job: stage(job, "train").get("state") == "Succeeded", 240, "train again", unless=failed
    )
    show(team, "again")
    found = stage_metrics(team, "again", "compile")
    assert stage(job, "compile")["state"] == "Reused"
    assert (found["graphs"], found["cacheHits"], found["graphsCompiled"]) == (GRAPHS, GRAPHS, 0)
    assert found["seconds"] < 5, "nothing is traced"
    [first, _] = sorted(pods(team, "again")["compile"], key=lambda pod: pod["metadata"]["name"])
    assert f"all {GRAPHS} graphs are compiled already" in log(team, first)
    assert held_parameters(team, "again") == parameters
    kube.kubectl("delete", "ftj", "again", "-n", team.namespace, "--timeout=60s")


def test_a_graph_that_the_compiler_cannot_make_ends_the_job_before_train(team: Team, trainium: NeuronNode) -> None:
    """The stand-in fails the held-out loss: every other graph is compiled, and nothing is tried again."""
    make_sources(team)
    job = neuron_job(team, "unlucky")
    job["spec"]["stages"]["train"]["env"].append({"name": "FAKE_NEURON_FAIL", "value": "held-out-loss"})
    team.apply(job)
    job = team.wait("unlucky", failed, 240, "the job to fail")
    show(team, "unlucky")
    told = condition(job, "Succeeded")
    assert stage(job, "compile")["attempt"] == 1
    assert "1 of 4 graphs failed" in told["message"]
    assert "input1_set" in told["message"], "the compiler's own words"
    assert "train" not in pods(team, "unlucky")
