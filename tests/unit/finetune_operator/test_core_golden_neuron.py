"""The compile and train Jobs of examples/llama3-8b-dolly-trn1.yaml, with a comment on where each value comes from, and
held to what the published walkthrough sets. `make golden` rewrites the file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from builders import job_body
from simulated import SETTINGS, Simulation

from finetune_operator.api.constants import ANNOTATION_STAGE_JSON, LABEL_STAGE
from finetune_operator.core.accelerators.neuron import CACHE_PATH
from finetune_operator.core.inputs import job_parallelism
from finetune_operator.core.memory import trainable_parameters
from finetune_operator.core.model_shapes import BUILT_IN_SHAPES
from finetune_operator.core.parallelism import ParallelismError
from finetune_operator.core.records import ANNOTATION_DEFAULT_IMAGE
from finetune_operator.surroundings import check_job
from finetune_trainer.neuron_environment import neuron_variables

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "llama3-8b-dolly-trn1.yaml"
GOLDEN = ROOT / "tests" / "golden" / "job-llama3-8b-dolly-trn1.yaml"
LLAMA_8B = BUILT_IN_SHAPES["meta-llama/meta-llama-3-8b"]
NEURON = replace(SETTINGS, neuron_image="registry.example/finetune-trainer-neuron:0123abc")
MODEL = {
    "hiddenSize": 4096,
    "layers": 32,
    "heads": 32,
    "kvHeads": 8,
    "intermediateSize": 14336,
    "vocabSize": 128256,
    "parameters": 8_030_261_248,
    "tied": False,
    "modelType": "llama",
}

Manifest = dict[str, Any]


def example(**spec: Any) -> dict[str, Any]:
    body: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    body["metadata"] = job_body(name=body["metadata"]["name"])["metadata"]
    body["spec"].update(spec)
    return body


def started(**spec: Any) -> dict[str, Manifest]:
    """The Job of every stage of the example, as the operator makes them one after another."""
    simulation = Simulation(body=example(**spec), settings=NEURON, kueue_installed=True)
    jobs: dict[str, Manifest] = {}
    for stage in ("prepare", "compile", "train", "consolidate", "merge", "evaluate"):
        simulation.settle()
        (made,) = (job for job in simulation.jobs.values() if job["metadata"]["labels"][LABEL_STAGE] == stage)
        jobs[stage] = copy.deepcopy(made)
        del jobs[stage]["metadata"]["creationTimestamp"], jobs[stage]["metadata"]["uid"]
        kept = {
            name: text for name, text in made["metadata"]["annotations"].items() if name == ANNOTATION_DEFAULT_IMAGE
        }
        jobs[stage]["metadata"]["annotations"] = kept  # others are the record of earlier stages, with times
        made["spec"]["suspend"] = False  # as Kueue does when it admits the stage
        simulation.run_stage(stage, **({"model": MODEL, "maxSteps": 1200} if stage == "prepare" else {}))
    return jobs


@cache
def one_node() -> Mapping[str, Manifest]:
    return started()


@cache
def two_nodes() -> Mapping[str, Manifest]:
    return started(accelerator={"type": "neuron", "instanceType": "ml.trn1.32xlarge", "nodes": 2})


def pod(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]["template"]["spec"]
    return spec


def container(manifest: Manifest) -> Manifest:
    (found,) = pod(manifest)["containers"]
    return dict(found)


def environment(manifest: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(manifest)["env"]}


def stage_json(manifest: Manifest) -> Manifest:
    annotations = manifest["spec"]["template"]["metadata"]["annotations"]
    found: Manifest = json.loads(annotations[ANNOTATION_STAGE_JSON])
    return found


# ---- the golden file

ORIGINS: Mapping[str, str] = {
    "apiVersion": "",
    "kind": "",
    "metadata.annotations": "chart, images.neuron: what the stage goes on with after an upgrade",
    "metadata.labels.app": "constants.py",
    "metadata.labels.finetune": "names.py: by which the operator finds its children",
    "metadata.labels.kueue": "example, queue; HyperPod task governance: LocalQueue hyperpod-ns-<team>-localqueue",
    "metadata.name": "names.py: job, stage, digest of what goes in, attempt",
    "metadata.namespace": "the FineTuneJob's",
    "metadata.ownerReferences": "the FineTuneJob: its garbage goes with it",
    "spec.backoffLimit": "design/0001: attempts are the operator's, in place of the walkthrough's maxRestarts",
    "spec.completionMode": "one index a node, torchrun's node rank",
    "spec.completions": "example, accelerator.nodes (walkthrough: replicas and --nnodes)",
    "spec.parallelism": "example, accelerator.nodes: a gang",
    "spec.podReplacementPolicy": "no pod beside one that still ends",
    "spec.suspend": "design/0013: Kueue lets it start",
    "spec.template.metadata.annotations": "inputs.py: the part of the spec, sizes and inputs that the stage runs from",
    "spec.template.metadata.labels.app": "constants.py",
    "spec.template.metadata.labels.finetune": "names.py",
    "spec.template.metadata.labels.kueue": "HyperPod CLI: labels on the Job and its pods",
    "spec.template.spec.automountServiceAccountToken": "the pod has no business with the API server",
    "spec.template.spec.enableServiceLinks": "no variables of other Services in the environment",
    "spec.template.spec.nodeSelector": "walkthrough, nodeSelector (compile_peft.yaml-template)",
    "spec.template.spec.restartPolicy": "design/0001, in place of the walkthrough's OnFailure",
    "spec.template.spec.securityContext": "Pod Security Standard “restricted”",
    "spec.template.spec.terminationGracePeriodSeconds": "settings.py: long enough for a checkpoint on SIGTERM",
    "spec.template.spec.tolerations": "the Neuron device plugin's taint on Trainium nodes",
    "spec.template.spec.volumes.shm": "an eighth of the pod's memory (walkthrough: hostPath /dev/shm)",
    "spec.template.spec.volumes.workspace": "example, workspace.claimName (walkthrough: fsx-claim at /fsx)",
    "spec.template.spec.volumes.scratch": "the root file system is read-only",
    "spec.template.spec.volumes.config": "stage.json and secrets as files",
    "container.args": "the stage's program: neuron_parallel_compile and torchrun are started by it",
    "container.image": "chart, images.neuron: built on the walkthrough's own base image (neuron_stack.py)",
    "container.imagePullPolicy": "chart, images.trainer.pullPolicy: tags are digests of the content",
    "container.name": "constants.py",
    "container.resources.limits.aws.amazon.com/neuron": "walkthrough, NEURON_PER_NODE=16 (generate-jobspec.sh)",
    "container.resources.requests.aws.amazon.com/neuron": "walkthrough, NEURON_PER_NODE=16 (generate-jobspec.sh)",
    "container.resources.limits.memory": "HyperPod CLI, quota_allocation_util.py: what a pod can have of 512 GiB",
    "container.resources.requests.memory": "HyperPod CLI, quota_allocation_util.py: what a pod can have of 512 GiB",
    "container.resources.requests.cpu": "HyperPod CLI, quota_allocation_util.py: what a pod can have of 128 vCPU",
    "container.securityContext": "Pod Security Standard “restricted”",
    "container.terminationMessage": "contract.py: the stage's report",
    "container.volumeMounts": "contract.py: where the volumes below are mounted",
}
"""Where values come from, by the beginning of their place; variables have their own table, neuron_environment.py."""


def commented(manifest: Manifest) -> str:
    """The manifest as YAML with a comment behind every value."""
    text = yaml.safe_dump(manifest, width=1_000_000)
    lines = text.splitlines()
    sources = {each.name: _shorter(each.source) for each in _variables(manifest)}
    for place, line in _leaves(yaml.compose(text), manifest, ""):
        if place.startswith("container.env."):
            comment = sources.get(place.rpartition(".")[2], "contract.py: the scratch volume")
        else:
            comment = ORIGINS[_longest(place)]
        if comment:
            lines[line] += f"  # {comment}"
    return "\n".join(lines) + "\n"


def _shorter(source: str) -> str:
    sample = "awslabs/awsome-distributed-training, 3.test_cases/pytorch/"
    walkthrough = source.replace(f"{sample}optimum-neuron/llama3/", "walkthrough, ")
    return walkthrough.replace(f"{sample}neuronx-distributed/llama3/", "AWS's sample of neuronx-distributed, ")


def _variables(manifest: Manifest) -> Any:
    has_efa = "FI_PROVIDER" in environment(manifest)
    return neuron_variables("ml.trn1.32xlarge", cores=32, has_efa=has_efa, cache_path=CACHE_PATH)


def _longest(place: str) -> str:
    found = [origin for origin in ORIGINS if place.startswith(origin)]
    assert found, f"{place} has no origin: say in ORIGINS where it comes from"
    return max(found, key=len)


def _leaves(node: yaml.Node | None, value: Any, place: str) -> Iterator[tuple[str, int]]:
    """(place, line) of every value that is no map and no list, or an empty one. A variable is told by its name."""
    place = place.replace("spec.template.spec.containers.stage", "container")
    if isinstance(node, yaml.MappingNode) and node.value:
        names = set(value)
        for key, below in node.value:
            if names == {"name", "value"}:
                if key.value == "value":
                    yield place, below.start_mark.line
                continue
            yield from _leaves(below, value[key.value], f"{place}.{key.value}".removeprefix("."))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for number, below in enumerate(node.value):
            entry = value[number]
            name = entry.get("name", number) if isinstance(entry, dict) else number
            yield from _leaves(below, entry, f"{place}.{name}")
    elif node is not None:
        yield place, node.start_mark.line


def test_golden_manifests_of_compile_and_train_say_where_each_value_comes_from() -> None:
    jobs = one_node()
    text = "---\n".join(commented(jobs[stage]) for stage in ("compile", "train"))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"{GOLDEN.name} differs: run `make golden` and review the diff"
    assert list(yaml.safe_load_all(text)) == [jobs["compile"], jobs["train"]], "comments change nothing"


# ---- the published walkthrough

K8S = "awslabs/awsome-distributed-training at 0edaf15, …/optimum-neuron/llama3/kubernetes/fine-tuning"
SLURM = "aws-samples/awsome-distributed-training at d2d5762, …/optimum-neuron/llama3/slurm/fine-tuning"
NXD = (
    "awslabs/awsome-distributed-training at 0edaf15, …/neuronx-distributed/llama3/kubernetes/llama3_train.yaml-template"
)
POST = "the AWS post “PEFT fine tuning of Llama 3 on SageMaker HyperPod with AWS Trainium”"

Kind = Literal["variable", "flag", "resource", "selector", "size", "training", "method", "data", "pod"]


@dataclass(frozen=True)
class Published:
    """One thing that the walkthrough sets for its compile or train pods."""

    kind: Kind
    name: str
    value: Any
    source: str
    stage: str = ""
    """The one stage that it is set for; "" for both."""


PUBLISHED = (
    Published("variable", "NEURON_RT_NUM_CORES", "32", f"{K8S}/templates"),
    Published("variable", "GPUS_PER_NODE", "32", f"{K8S}/templates"),
    Published("variable", "OMP_NUM_THREADS", "1", f"{K8S}/templates"),
    Published("variable", "NEURON_FUSE_SOFTMAX", "1", f"{K8S}/templates"),
    Published("variable", "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "5", f"{K8S}/templates"),
    Published("variable", "NEURON_RT_STOCHASTIC_ROUNDING_EN", "1", f"{K8S}/templates"),
    Published("variable", "MALLOC_ARENA_MAX", "70", f"{K8S}/templates"),
    Published("variable", "NEURON_EXTRACT_GRAPHS_ONLY", "1", f"{K8S}/templates/compile_peft.yaml-template", "compile"),
    Published("variable", "FI_PROVIDER", "efa", f"{SLURM}/finetune-llama3-8B.sh"),
    Published("variable", "XLA_USE_BF16", "1", POST),
    Published("flag", "--model-type", "transformer", f"{K8S}/templates; {SLURM}/finetune-llama3-8B.sh"),
    Published("flag", "--distribution-strategy", "llm-training", f"{K8S}/templates"),
    Published("flag", "--enable-saturate-infinity", "", f"{K8S}/templates"),
    Published("flag", "--target", "trn1", f"{SLURM}/finetune-llama3-8B.sh"),
    Published("resource", "aws.amazon.com/neuron", "16", f"{K8S}/generate-jobspec.sh"),
    Published("resource", "vpc.amazonaws.com/efa", "8", f"{K8S}/generate-jobspec.sh"),
    Published("selector", "node.kubernetes.io/instance-type", "ml.trn1.32xlarge", f"{K8S}/templates"),
    Published("size", "procsPerNode", 32, f"{K8S}/generate-jobspec.sh, NEURON_CORES"),
    Published("size", "tensorParallelSize", 8, f"{K8S}/generate-jobspec.sh, TP_SIZE"),
    Published("size", "pipelineParallelSize", 1, f"{SLURM}/finetune-llama3-8B.sh, --pp_size"),
    Published("size", "dataParallelSize", 4, f"{K8S}/README.md, DP Workers; {POST}"),
    Published("training", "microBatchSize", 1, f"{K8S}/templates, --per_device_train_batch_size"),
    Published("training", "gradientAccumulationSteps", 3, f"{K8S}/templates; {POST}"),
    Published("training", "learningRate", 2e-5, f"{K8S}/generate-jobspec.sh"),
    Published("training", "weightDecay", 0.01, f"{K8S}/templates"),
    Published("training", "warmupSteps", 100, f"{K8S}/templates"),
    Published("training", "checkpointEverySteps", 400, f"{K8S}/templates, --save_steps"),
    Published("training", "maxSteps", 1200, "aws-samples/… at 534c6b6, generate-jobspec.sh, MAX_TRAINING_STEPS"),
    Published("training", "seed", 42, f"{SLURM}/finetune-llama3-8B.sh"),
    Published("training", "precision", "bf16", f"{K8S}/templates, --bf16"),
    Published("training", "logEverySteps", 1, f"{K8S}/templates, --logging_steps"),
    Published("method", "rank", 16, f"{K8S}/templates, --lora_r"),
    Published("method", "alpha", 16, f"{K8S}/templates, --lora_alpha"),
    Published("method", "dropout", 0.05, f"{K8S}/templates, --lora_dropout"),
    Published("method", "targetModules", ["q_proj", "v_proj"], f"{POST}: 6,815,744 trainable parameters"),
    Published("data", "maxLength", 2048, f"{K8S}/generate-jobspec.sh, MAX_SEQ_LENGTH"),
    Published("data", "source", "hf://databricks/databricks-dolly-15k", f"{K8S}/generate-jobspec.sh, DATASET_NAME"),
    Published("data", "packing", "bestFit", f"{K8S}/README.md, Sequence packing"),
    Published("pod", "workspace volume", "fsx-claim", f"{K8S}/templates, persistent-storage at /fsx"),
    Published("pod", "shared memory", "/dev/shm", f"{K8S}/templates, shmem"),
    Published("pod", "hostPath", "/dev/shm, /dev and /var/log/aws/clusters", f"{K8S}/templates"),
    Published("pod", "restartPolicy OnFailure", "maxRestarts 100, etcd", f"{K8S}/templates"),
    Published("pod", "imagePullPolicy Always", "tag latest", f"{K8S}/templates"),
)
"""Everything that the two templates, their Slurm script and the post set, but names of folders and of the Secret."""

DIFFERENCES: Mapping[str, tuple[Any, str]] = {
    "GPUS_PER_NODE": (None, "the walkthrough's own command does not read it; the number of processes is in stage.json"),
    "NEURON_EXTRACT_GRAPHS_ONLY": (None, "set by the compile stage for the program that it traces, not for the pod"),
    "FI_PROVIDER": (None, "one node needs no network; with several it is set (below)"),
    "vpc.amazonaws.com/efa": (
        None,
        "one node needs no network, and its interfaces stay free; with several all are taken",
    ),
    "XLA_USE_BF16": (None, "obsolete: it would turn the float32 masters into bf16, too"),
    "logEverySteps": (10, "a line waits for the device; the spec's default, and training.jsonl has all steps' mean"),
    "hostPath": (None, "the host is not mounted: /dev/shm is a memory volume, devices come from the plugin"),
    "restartPolicy OnFailure": (None, "attempts are the operator's (design/0001), and torchrun meets without etcd"),
    "imagePullPolicy Always": (None, "tags are digests of the content: a stage runs what it was planned with"),
}
"""What ours deliberately does otherwise: our value, None for nothing, and the reason."""


def ours(published: Published, manifest: Manifest) -> Any:
    """What our pod has for a thing that the walkthrough sets; None where it has none."""
    spec, sizes = stage_json(manifest)["spec"], stage_json(manifest)["parallelism"]
    flags = dict(word.partition("=")[::2] for word in environment(manifest)["NEURON_CC_FLAGS"].split())
    volumes = {volume["name"]: volume for volume in pod(manifest)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifest)["volumeMounts"]}
    found: Mapping[str, Any] = {
        "variable": environment(manifest),
        "flag": flags,
        "resource": container(manifest)["resources"]["limits"],
        "selector": pod(manifest)["nodeSelector"],
        "size": sizes,
        "training": spec["training"],
        "method": spec["method"]["lora"],
        "data": stage_json(one_node()["prepare"])["spec"]["dataset"],
        "pod": {
            "workspace volume": volumes["workspace"]["persistentVolumeClaim"]["claimName"],
            "shared memory": mounts["shm"],
        },
    }[published.kind]
    return found.get(published.name)


@pytest.mark.parametrize("stage", ["compile", "train"])
@pytest.mark.parametrize("published", PUBLISHED, ids=[f"{each.kind}: {each.name}" for each in PUBLISHED])
def test_nothing_that_the_walkthrough_sets_is_lacking(published: Published, stage: str) -> None:
    value = ours(published, one_node()[stage])
    if published.name in DIFFERENCES:
        assert value == DIFFERENCES[published.name][0] != published.value, f"{published.name} is no difference any more"
    elif published.stage in ("", stage):
        assert value == published.value, f"{published.name}: {published.value} in {published.source}"


def test_every_difference_is_one_to_something_published() -> None:
    assert set(DIFFERENCES) <= {each.name for each in PUBLISHED}


def test_several_nodes_take_all_network_interfaces_and_their_variables() -> None:
    for stage in ("compile", "train"):
        manifest = two_nodes()[stage]
        assert container(manifest)["resources"]["limits"]["vpc.amazonaws.com/efa"] == "8", f"{K8S}/generate-jobspec.sh"
        published = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
        assert environment(manifest).items() >= published.items(), NXD


def test_compile_and_train_differ_in_stage_and_place_only() -> None:
    compiled, trained = one_node()["compile"], one_node()["train"]
    assert container(compiled)["args"][0] == "compile"
    assert container(trained)["args"][0] == "train"
    for part in ("image", "env", "resources", "volumeMounts", "securityContext"):
        assert container(compiled)[part] == container(trained)[part]
    for part in ("nodeSelector", "tolerations", "securityContext"):
        assert pod(compiled)[part] == pod(trained)[part]
    for part in ("spec", "parallelism", "image"):
        assert stage_json(compiled)[part] == stage_json(trained)[part]


@pytest.mark.parametrize("jobs", [one_node, two_nodes], ids=["one node", "two nodes"])
def test_only_compile_and_train_hold_devices(jobs: Any) -> None:
    """The walkthrough's consolidation and merge pods hold 16 Neuron devices and 8 interfaces for work on CPUs."""
    for stage, manifest in jobs().items():
        resources = container(manifest)["resources"]
        held = {name for part in resources.values() for name in part if "amazonaws.com" in name or "amazon.com" in name}
        assert bool(held) == (stage in ("compile", "train")), f"{stage} holds {held}"


# ---- the example itself


def test_the_example_uses_all_cores_and_is_sound() -> None:
    simulation = Simulation(body=example(), settings=NEURON)
    pipeline, _ = simulation.decide()
    checked = check_job(simulation.job, pipeline, NEURON)
    assert (checked.findings.refused, checked.findings.doubts) == (None, ())
    sizes = job_parallelism(simulation.job, NEURON)
    assert (sizes.world_size, sizes.tp_size, sizes.dp_size, sizes.global_batch_size) == (32, 8, 4, 12)
    assert trainable_parameters(simulation.job.spec, LLAMA_8B) == 6_815_744


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"tensorParallelSize": 12},
            ["32 processes", "tensorParallelSize 12 * pipelineParallelSize 1 = 12", "8 or 16"],
        ),
        ({"tensorParallelSize": 64}, ["32 processes", "= 64", "tensorParallelSize 32", "nodes 2"]),
        ({"tensorParallelSize": 8, "pipelineParallelSize": 3}, ["= 24", "pipelineParallelSize 2 or 4"]),
    ],
    ids=["a remainder", "more than there are", "a remainder by stages"],
)
def test_cores_that_would_be_left_over_are_refused_with_the_numbers(sizes: dict[str, int], words: list[str]) -> None:
    body = example(parallelism=sizes)
    body["spec"]["dataset"]["packing"] = "none"
    with pytest.raises(ParallelismError) as refused:
        job_parallelism(Simulation(body=body, settings=NEURON).job, NEURON)
    assert [word for word in words if word not in str(refused.value)] == []


def test_what_chart_or_spec_would_compile_otherwise_is_refused_with_the_job() -> None:
    body = example(stages={"compile": {"env": [{"name": "NEURON_CC_FLAGS", "value": "--cache_dir=/fsx/llama3.1"}]}})
    simulation = Simulation(body=body, settings=NEURON)
    refused = check_job(simulation.job, simulation.decide()[0], NEURON).findings.refused
    assert refused is not None
    assert refused.reason == "InvalidSpec"
    assert "spec.stages.compile.env: NEURON_CC_FLAGS: the compiler's cache must be an absolute path" in refused.message


def test_a_container_whose_sdk_cannot_train_is_refused_with_the_job() -> None:
    settings = replace(
        NEURON, neuron_image="r.example/pytorch-training-neuronx:2.9.0-neuronx-py312-sdk2.28.0-ubuntu24.04"
    )
    simulation = Simulation(body=example(), settings=settings)
    refused = check_job(simulation.job, simulation.decide()[0], settings).findings.refused
    assert refused is not None
    assert refused.reason == "UnsupportedInstanceSdkPair"
