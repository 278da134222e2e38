"""The commands as a shell runs them: what stands on standard output and error, exit codes, output forms, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import client_jobs
import pytest
import yaml
from client_jobs import NAME, there
from fake_api import FakeApi, serving
from job_specs import job_spec

from finetune_client.commands import complete, run
from finetune_client.errors import Exit

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = str(ROOT / "examples" / "tiny-cpu.yaml")
TRAINIUM = str(ROOT / "examples" / "llama3-8b-dolly-trn1.yaml")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def cluster(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("COLUMNS", "80")
    return api


@pytest.mark.parametrize(
    ("moment", "arguments", "code"),
    [
        pytest.param("running", ["status", NAME], Exit.OK, id="a job that runs has not failed"),
        pytest.param("failed", ["status", NAME], Exit.JOB_FAILED, id="status of a failed job"),
        pytest.param("failed", ["why", NAME], Exit.JOB_FAILED, id="why of a failed job"),
        pytest.param("failed", ["wait", NAME], Exit.JOB_FAILED, id="wait for a failed job"),
        pytest.param("failed", ["watch", NAME], Exit.JOB_FAILED, id="watch a failed job"),
        pytest.param("finished", ["wait", NAME], Exit.OK, id="wait for a finished job"),
        pytest.param("finished", ["watch", NAME], Exit.OK, id="watch a finished job"),
        pytest.param("queued", ["wait", NAME, "--timeout", "0.1"], Exit.TIMEOUT, id="a wait that is over"),
        pytest.param("queued", ["watch", NAME, "--timeout", "0.1"], Exit.TIMEOUT, id="a watch that is over"),
        pytest.param("running", ["status", "nix"], Exit.USAGE, id="no such job"),
        pytest.param("running", ["status"], Exit.USAGE, id="no name"),
        pytest.param("running", ["statsu"], Exit.USAGE, id="no such command"),
        pytest.param("running", ["status", NAME, "-o", "xml"], Exit.USAGE, id="no such form"),
        pytest.param("running", ["list", "--context", "prod"], Exit.CLUSTER, id="no such context"),
        pytest.param("running", ["retry", NAME], Exit.USAGE, id="nothing to try again"),
        pytest.param("running", ["logs", NAME, "--stage", "nix"], Exit.USAGE, id="no such stage"),
        pytest.param("running", ["--help"], Exit.OK, id="help"),
    ],
)
def test_the_exit_code_says_what_a_script_has_to_know(
    cluster: FakeApi, capsys: Captured, moment: str, arguments: list[str], code: int
) -> None:
    there(cluster, moment)
    assert run(arguments) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err or code in (Exit.OK, Exit.JOB_FAILED)


def test_a_forbidden_and_an_absent_cluster_have_a_code_of_their_own(
    cluster: FakeApi, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.trouble = lambda method, path: 403
    assert run(["list"]) == Exit.CLUSTER
    assert "finetune-operator-edit" in capsys.readouterr().err
    with serving(FakeApi()) as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig(tmp_path / "gone")))
    assert run(["list"]) == Exit.CLUSTER
    assert "does not answer" in capsys.readouterr().err
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nix"))
    assert run(["list"]) == Exit.CLUSTER
    assert "set KUBECONFIG" in capsys.readouterr().err


def test_a_wrong_spec_is_told_field_by_field(cluster: FakeApi, capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    spec = job_spec(dataset={"maxLength": 3}, method={"lora": {"rnk": 8}})
    file.write_text(yaml.safe_dump({"kind": "FineTuneJob", "metadata": {"name": "tiny"}, "spec": spec}), "utf-8")
    for command in (
        ["submit", str(file)],
        ["plan", str(file)],
        ["plan", "--offline", str(file)],
        ["render", str(file)],
    ):
        assert run(command) == Exit.USAGE
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "finetune: the spec is wrong in 2 places:"
        assert [line.strip().split(":")[0] for line in lines[1:]] == ["spec.dataset.maxLength", "spec.method.lora.rnk"]
    assert cluster.requests == []


def test_submit_and_list_and_the_forms_of_output(cluster: FakeApi, capsys: Captured) -> None:
    assert run(["submit", EXAMPLE]) == Exit.OK
    assert capsys.readouterr().out == (
        "research/tiny-cpu submitted\nfollow it with: finetune watch tiny-cpu -n research\n"
    )
    assert run(["list", "-o", "name"]) == Exit.OK
    assert capsys.readouterr().out == "finetunejob.finetune-operator.io/tiny-cpu\n"
    assert run(["list", "-o", "json"]) == Exit.OK
    assert [item["metadata"]["name"] for item in json.loads(capsys.readouterr().out)["items"]] == ["tiny-cpu"]
    assert run(["status", "tiny-cpu", "-o", "yaml"]) == Exit.OK
    assert yaml.safe_load(capsys.readouterr().out) == cluster.jobs["research", "tiny-cpu"]
    assert run(["list", "-n", "empty"]) == Exit.OK
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "there are no FineTuneJobs in namespace empty\n")


def test_why_as_json_has_causes_cures_and_log(cluster: FakeApi, capsys: Captured) -> None:
    there(cluster, "failed")
    assert run(["why", NAME, "-o", "json"]) == Exit.JOB_FAILED
    told = json.loads(capsys.readouterr().out)
    assert (told["standing"], told["stage"], told["reason"]) == ("failed", "train", "OutOfDeviceMemory")
    assert told["causes"][0]["cause"].startswith("the accelerator's memory is too small")
    assert told["log"] == list(client_jobs.LOG)
    assert told["attempt"]["lostSteps"] == 12


def test_the_screen_of_a_pipe_has_no_colours_no_trailing_blanks_and_fits(cluster: FakeApi, capsys: Captured) -> None:
    there(cluster, "running")
    assert run(["status", NAME]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() and len(line) <= 80 and "\x1b" not in line for line in lines)


def test_a_plan_that_would_be_refused_ends_in_code_1(capsys: Captured, tmp_path: Path) -> None:
    spec = {**client_jobs.WISH, "accelerator": {"type": "cuda", "instanceType": "ml.g5.12xlarge"}}
    file = tmp_path / "job.yaml"
    manifest = {"kind": "FineTuneJob", "metadata": {"name": "big"}, "spec": job_spec(**spec)}
    file.write_text(yaml.safe_dump(manifest), encoding="utf-8")
    assert run(["plan", "--offline", str(file)]) == Exit.JOB_FAILED
    assert "It would be refused (InvalidSpec)" in capsys.readouterr().out


def test_a_plan_without_a_cluster_has_memory_and_time_and_says_what_it_does_not_know(capsys: Captured) -> None:
    assert run(["plan", "--offline", TRAINIUM]) == Exit.OK
    out = capsys.readouterr().out
    assert "9.98 GiB of 16 GiB for each process" in out
    assert "spec.dryRun" not in out
    assert "feature gates are this package's built-in ones" in " ".join(out.split())


def test_the_installations_own_configuration_decides_prices_and_images(capsys: Captured, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    prices = {"ml.trn1.32xlarge": {"pricePerHour": 21.5}}
    gates = {"Neuron": True, "Publish": True}
    trainer = {"image": "registry/trainer:1", "neuronImage": "registry/neuron:1"}
    config.write_text(
        yaml.safe_dump({"trainer": trainer, "instanceTypes": prices, "featureGates": gates, "currency": "EUR"}),
        encoding="utf-8",
    )
    assert run(["plan", "--offline", TRAINIUM, "--config", str(config)]) == Exit.OK
    out = capsys.readouterr().out
    assert "EUR" in out
    assert "Without a cluster" not in out
    assert run(["render", TRAINIUM, "--config", str(config), "--stage", "train"]) == Exit.OK
    assert "image: registry/neuron:1" in capsys.readouterr().out
    assert run(["render", TRAINIUM, "--config", str(tmp_path / "nix")]) == Exit.USAGE


def test_render_is_what_the_operator_makes_and_stage_json_what_the_stage_reads(capsys: Captured) -> None:
    assert run(["render", EXAMPLE, "-n", "team-a", "--trainer-image", "registry.example/finetune-trainer:0123abc"]) == 0
    made = {each["metadata"]["name"]: each for each in yaml.safe_load_all(capsys.readouterr().out)}
    golden = yaml.safe_load_all((ROOT / "tests" / "golden" / "job-tiny-cpu.yaml").read_text(encoding="utf-8"))
    (prepare,) = (each for each in golden if "-prepare-" in each["metadata"]["name"])
    mine = made[prepare["metadata"]["name"]]
    assert mine["metadata"]["ownerReferences"][0].pop("uid") == "not-yet"
    assert mine["spec"]["template"]["spec"] == prepare["spec"]["template"]["spec"]
    assert run(["render", EXAMPLE, "--stage", "train", "--stage-json", "-o", "json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["train"]["stage"] == "train"
    assert run(["render", EXAMPLE, "--stage", "compile"]) == Exit.USAGE
    assert "it runs prepare, train, consolidate, merge, evaluate" in capsys.readouterr().err


def program(*arguments: str, name: str = "kubectl-finetune", **environment: str) -> subprocess.CompletedProcess[str]:
    executable = Path(sys.executable).with_name(name)
    return subprocess.run(
        [executable, *arguments],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_the_installed_program_calls_itself_as_kubectl_does() -> None:
    done = program("status")
    assert done.returncode == Exit.USAGE
    assert "kubectl finetune status" in done.stderr


def test_the_version_names_release_and_api(capsys: Captured) -> None:
    assert run(["--version"]) == Exit.OK
    assert capsys.readouterr().out == "finetune-client 0.1.0, API finetune-operator.io/v1alpha1\n"


def test_a_shell_completes_commands() -> None:
    words = {"COMP_WORDS": "kubectl-finetune sta", "COMP_CWORD": "1"}
    assert program(_KUBECTL_FINETUNE_COMPLETE="complete_bash", **words).stdout.split() == ["status"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param(["re"], ["resume", "retry", "report", "render"], id="commands"),
        pytest.param(["why", ""], [NAME], id="names of jobs"),
        pytest.param(["logs", NAME, "--stage", "con"], ["consolidate"], id="stages"),
    ],
)
def test_kubectl_completes_commands_names_and_stages(
    cluster: FakeApi, capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[str]
) -> None:
    there(cluster, "running")
    for name in ("_FINETUNE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")  # so that what it sets is taken back
    assert complete(words) == Exit.OK
    assert capsys.readouterr().out.split() == [*expected, ":4"]


def test_nothing_is_completed_without_a_cluster(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nix"))
    for name in ("_FINETUNE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")
    assert complete(["why", ""]) == Exit.OK
    assert capsys.readouterr().out.split() == [":4"]


def test_commands_without_a_cluster_start_without_the_kubernetes_client() -> None:
    script = (
        "import sys; from finetune_client.commands import complete, run; run(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('kubernetes', 'aiohttp', 'kopf', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False).returncode == 0
