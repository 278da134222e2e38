"""hack/trainium-check.sh with stand-ins for what it asks: what is right, what differs, what cannot be asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from finetune_operator.core.accelerators.instances import BUILT_IN, requestable_cpu, requestable_memory_gib

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "hack" / "trainium-check.sh"

STAND_IN = """#!{python} -SE
# Answers as the file beside it says: the first entry whose words are all in the command line; else python3 is itself.
import json, os, sys
folder, name = os.path.split(__file__)
line = " ".join(sys.argv[1:])
for words, answer in json.load(open(os.path.join(folder, "answers.json")))[name]:
    if all(word in line for word in words):
        print(answer)
        sys.exit(0)
if name == "python3":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
sys.exit(1)
"""

Answers = dict[str, list[tuple[list[str], str]]]
DEVICES = [{"neuron_device": index, "nc_count": 2, "memory_size": 34359738368} for index in range(16)]
NODE = {
    "metadata.name": "hyperpod-i-0123456789abcdef0",
    "node-health-status": "Schedulable",
    "deep-health-check-status": "Passed",
    "com/neuron}": "16",
    "com/neurondevice}": "",
    "com/neuroncore}": "32",
    "com/efa}": "8",
    "allocatable.memory": f"{500 * 1048576}Ki",
    "allocatable.cpu": "127610m",
    "taints": "aws.amazon.com/neuron",
}
ANSWERS: Answers = {
    "kubectl": [
        (["api-versions"], "batch/v1\nkueue.x-k8s.io/v1beta1"),
        (["version"], "Client Version: v1.33.1\nServer Version: v1.33.4-eks-1234567"),
        (["get nodes", "-o name"], "node/hyperpod-i-0123456789abcdef0"),
        (["get nodes", "items[0]"], NODE["metadata.name"]),
        (
            ["get nodes", "-o json"],
            '"sagemaker.amazonaws.com/fault-types": "x", "sagemaker.amazonaws.com/fault-details": "[]"',
        ),
        *((["get node hyperpod", words], answer) for words, answer in NODE.items()),
        (["clusterqueues"], '["cpu","memory","aws.amazon.com/neuron","vpc.amazonaws.com/efa"]'),
        (["localqueues"], "default hyperpod-ns-research-localqueue"),
        (["workloadpriorityclasses"], "fine-tuning-priority training-priority"),
        (["storageclasses"], '"provisioner": "fsx.csi.aws.com"'),
    ],
    "id": [(["-u"], "65532")],
    "find": [(["/dev"], ""), (["neuron-cache"], "/scratch/neuron-cache/a/model.neff")],
    "ls": [
        (["/dev/neuron"], "\n".join(f"/dev/neuron{index}" for index in range(16))),
        (["/dev/infiniband"], "\n".join(f"/dev/infiniband/uverbs{index}" for index in range(8))),
        (["model.neff"], "/scratch/neuron-cache/neuronxcc-2.21.18209.0+043b1bf7/MODULE_1+2/model.neff"),
    ],
    "cat": [(["product_name"], "trn1.32xlarge")],
    "df": [(["/dev/shm"], f"Filesystem 1K-blocks\nshm {57 * 1048576} 0")],
    "prlimit": [(["--memlock"], "unlimited")],
    "neuron-ls": [(["--json-output"], json.dumps(DEVICES))],
    "fi_info": [(["-p efa"], "\n".join(["provider: efa"] * 16))],
    "neuronx-cc": [(["--version"], "NeuronX Compiler version 2.21.18209.0+043b1bf7")],
    "python3": [
        (["platform.python_version"], "3.10.12"),
        (["version('torch')"], "2.8.0+cu128"),
        (["version('torch-neuronx')"], "2.8.0.2.10.13553+1e4dd6ca"),
        (["version('libneuronxla')"], "2.2.12677.0"),
        (["version('neuronx-distributed')"], "0.15.22404+1f27bddf"),
        (["version('optimum-neuron')"], "0.4.5"),
        (["version('transformers')"], "4.57.6"),
        (["import optimum.neuron"], "ok"),
        (["get_platform_target"], "trn1"),
        (["ranks.py"], "sum 32"),
        (["graph.py"], "same seed equal True other seed equal False"),
    ],
    "neuron_parallel_compile": [(["graph.py"], "INFO: Total graphs: 2\nTotal failed compilations: 0")],
    "nccom-test": [(["allr"], "64MB 1.2 ms 53 GB/s")],
}


def run(
    tmp_path: Path, section: str, answers: Mapping[str, object], *more: str, path: str = os.environ["PATH"]
) -> subprocess.CompletedProcess[str]:
    """The program with these stand-ins before `path`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "answers.json").write_text(json.dumps(answers))
    for name in answers:
        program = tools / name
        program.write_text(STAND_IN.replace("{python}", sys.executable))
        program.chmod(0o755)
    environment = {"PATH": f"{tools}:{path}", "HOME": str(tmp_path)}
    command = [shutil.which("bash") or "/bin/bash", str(PROGRAM), section, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def verdicts(output: str) -> dict[str, str]:
    """ok, NOT or - by row."""
    return {row: verdict for verdict, row in re.findall(r"^\| (ok|NOT|-) \| (\w+) \|", output, re.MULTILINE)}


OTHER_PLACE = {"N19"}
"""Its answer is a path of the image, which a stand-in cannot have."""


Finished = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module", params=["cluster", "node", "training"])
def as_expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Finished]:
    """(section, folder, run) of each section on a machine where everything is as it is claimed to be."""
    section: str = request.param
    folder = tmp_path_factory.mktemp(section)
    return section, folder, run(folder, section, ANSWERS, *([str(folder / "scratch")] if section == "training" else []))


def test_a_machine_that_is_as_expected_passes_every_row(as_expected: tuple[str, Path, Finished]) -> None:
    section, _, done = as_expected
    found = verdicts(done.stdout)
    assert len(found) == {"cluster": 19, "node": 21, "training": 6}[section], done.stdout
    different = {row: verdict for row, verdict in found.items() if verdict != "ok"}
    assert different == dict.fromkeys(found.keys() & OTHER_PLACE, "NOT"), done.stdout
    assert done.returncode == (1 if found.keys() & OTHER_PLACE else 0)


def test_only_training_writes_and_only_where_it_is_told_to(as_expected: tuple[str, Path, Finished]) -> None:
    section, folder, _ = as_expected
    assert {path.name for path in folder.iterdir()} == {"tools"} | ({"scratch"} if section == "training" else set())


def test_nothing_of_the_cluster_is_changed() -> None:
    code = [line for line in PROGRAM.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    verbs = re.findall(r"[\"$(|]kubectl (?!\")([a-z-]+)", "\n".join(code))
    assert set(verbs) == {"get", "version", "api-versions"}


def changed(**first: list[tuple[list[str], str]]) -> Answers:
    """ANSWERS with these before a program's own."""
    return {**ANSWERS, **{name: [*answers, *ANSWERS[name]] for name, answers in first.items()}}


@pytest.mark.parametrize(
    ("section", "answers", "lines"),
    [
        pytest.param(
            "node",
            changed(
                **{"fi_info": [(["-p efa"], "provider: efa")], "neuron-ls": [(["--json"], json.dumps(DEVICES[:1]))]}
            ),
            {"N5": "| `=32` | 2 |", "N8": "| `>=8` | 1 |"},
            id="one device of 16 and one interface of 8",
        ),
        pytest.param(
            "cluster",
            changed(kubectl=[(["com/neuron}"], ""), (["taints"], "aws.amazon.com/neuron example.com/ours")]),
            {"K6": "| `=16` | nothing |", "K12": "| `=` | example.com/ours |"},
            id="devices under the other name only and a taint that pods do not tolerate",
        ),
    ],
)
def test_what_differs_is_shown_beside_what_was_expected(
    tmp_path: Path, section: str, answers: Answers, lines: dict[str, str]
) -> None:
    done = run(tmp_path, section, answers)
    assert done.returncode == 1
    shown = {line.split(" | ")[1]: line for line in done.stdout.splitlines() if line.startswith("| NOT |")}
    assert shown.keys() - OTHER_PLACE == lines.keys()
    assert all(words in shown[row] for row, words in lines.items())


def test_what_cannot_be_asked_is_no_difference(tmp_path: Path) -> None:
    done = run(tmp_path, "node", {}, path="/nowhere")
    assert set(verdicts(done.stdout).values()) == {"-"}
    assert "neuron-ls is not here" in done.stdout
    assert done.returncode == 2


def test_an_unknown_section_says_what_there_is(tmp_path: Path) -> None:
    done = run(tmp_path, "everything", ANSWERS)
    assert done.returncode == 2
    assert "hack/trainium-check.sh cluster" in done.stderr


@pytest.mark.parametrize("name", ["trn1.32xlarge", "trn1n.32xlarge", "trn2.48xlarge"])
def test_the_counts_are_those_of_the_instance_table(name: str) -> None:
    found = re.search(
        rf"^  {re.escape(name)}\) devices=(\d+) cores=(\d+) efa=(\d+) cpu=(\d+) memory=(\d+) ;;$",
        PROGRAM.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    instance = BUILT_IN[f"ml.{name}"]
    assert found is not None
    assert [int(each) for each in found.groups()] == [
        instance.devices,
        instance.cores,
        instance.efa,
        requestable_cpu(instance),
        requestable_memory_gib(instance),
    ]


def test_the_pod_that_is_printed_is_as_restricted_as_a_stages(tmp_path: Path) -> None:
    done = run(tmp_path, "pod", {}, "registry.test/finetune-neuron:1", "fsx-claim")
    pod = yaml.safe_load(done.stdout)
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 65532
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"] == {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "8"}
    assert {"name": "workspace", "persistentVolumeClaim": {"claimName": "fsx-claim"}} in pod["spec"]["volumes"]
