"""FineTuneClient against an API server over HTTP: what is asked, what comes back, and every way that it goes wrong."""

from __future__ import annotations

import threading
from pathlib import Path

import client_jobs
import pytest
import yaml
from client_jobs import status_at, there
from fake_api import FakeApi, Raw, serving
from job_specs import job_spec

from finetune_client import (
    ClusterUnreachable,
    FineTuneClient,
    FineTuneJobSpec,
    Forbidden,
    JobExists,
    JobFailed,
    JobNotFound,
    ManifestError,
    NothingToRetry,
    Refused,
    SpecError,
    WaitTimeout,
)
from finetune_client.errors import ClientError
from finetune_operator.api.finetunejob import parse_spec
from finetune_trainer.report import reporting

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 10.0
JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/research/finetunejobs"


def later(api: FakeApi, *statuses: Raw, name: str = client_jobs.NAME) -> threading.Thread:
    """Statuses that the operator writes one after another, each once the one before was seen by a watch or a read."""

    def write() -> None:
        for status in statuses:
            api.set_status("research", name, status)

    thread = threading.Timer(0.05, write)
    thread.start()
    return thread


# ---- submit


@pytest.mark.parametrize("how", ["file", "mapping", "spec"])
def test_a_job_is_made_of_a_file_a_manifest_or_a_spec(
    api: FakeApi, client: FineTuneClient, tmp_path: Path, how: str
) -> None:
    manifest = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}}
    manifest["spec"] = job_spec()
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump_all([{"kind": "Secret"}, manifest]), encoding="utf-8")
    source = {"file": file, "mapping": manifest, "spec": parse_spec(job_spec())}[how]
    made = client.submit(source, name="other" if how == "spec" else None)
    assert (made.namespace, made.name) == ("research", "other" if how == "spec" else "tiny")
    assert isinstance(made.spec, FineTuneJobSpec)
    assert made.spec == parse_spec(api.jobs["research", made.name]["spec"]) == parse_spec(job_spec())
    assert api.requests == [("POST", f"{JOBS}?fieldManager=finetune-client")]


def test_everything_that_is_wrong_with_a_spec_is_told_before_the_server_is_asked(
    api: FakeApi, client: FineTuneClient
) -> None:
    wrong = {"metadata": {"name": "tiny"}, "spec": job_spec(dataset={"maxLength": 3}, method={"lora": {"rnk": 8}})}
    with pytest.raises(SpecError) as caught:
        client.submit(wrong)
    told = {problem.field: str(problem) for problem in caught.value.problems}
    assert "spec.dataset.maxLength" in told
    assert "16" in told["spec.dataset.maxLength"]
    assert "rank" in told["spec.method.lora.rnk"], "the nearest field is named"
    assert api.requests == []


def test_a_manifests_own_namespace_wins_as_with_kubectl(api: FakeApi, client: FineTuneClient) -> None:
    made = client.submit({"metadata": {"name": "tiny", "namespace": "team-b"}, "spec": job_spec()})
    assert made.namespace == "team-b"
    assert ("team-b", "tiny") in api.jobs


def test_two_namespaces_that_differ_are_refused_as_with_kubectl(api: FakeApi, kubeconfig: Path) -> None:
    asked = FineTuneClient(kubeconfig=kubeconfig, namespace="team-c")
    with pytest.raises(ManifestError, match="metadata.namespace is team-b and --namespace team-c"):
        asked.submit({"metadata": {"name": "tiny", "namespace": "team-b"}, "spec": job_spec()})
    assert api.requests == []


def test_a_servers_dry_run_makes_nothing(api: FakeApi, client: FineTuneClient) -> None:
    client.submit({"metadata": {"name": "tiny"}, "spec": job_spec()}, dry_run=True)
    assert api.jobs == {}
    assert "dryRun=All" in api.requests[0][1]


def test_a_taken_name_says_what_to_do(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    with pytest.raises(JobExists, match=r"research/llama3-8b-dolly exists: delete it, choose another name"):
        client.submit(client_jobs.body(), name=client_jobs.NAME)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("kind: Secret", "has 0 objects of kind FineTuneJob", id="no job in it"),
        pytest.param("kind: FineTuneJob\n---\nkind: FineTuneJob", "has 2 objects", id="two jobs in it"),
        pytest.param("a: [", "is no YAML", id="no YAML"),
        pytest.param("kind: FineTuneJob\nspec: {}", "metadata.name is missing", id="no name"),
        pytest.param(None, "No such file", id="no file"),
    ],
)
def test_a_file_that_holds_no_job_is_told(client: FineTuneClient, tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "job.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=words):
        client.submit(file)


# ---- look, wait


def test_a_job_is_read_into_the_operators_own_types(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    job = client.get(client_jobs.NAME)
    expected = client_jobs.job_at("running")[0]
    assert (job.spec, job.status) == (expected.spec, expected.status)
    assert (job.phase, job.progress, job.is_finished) == ("Training", 0.52, False)
    assert job.status.training is not None
    assert job.status.training.step == 760


def test_a_job_that_is_not_there_is_told_with_where_to_look(client: FineTuneClient) -> None:
    for call in (client.get, client.wait, client.suspend, client.delete, client.retry, client.report):
        with pytest.raises(JobNotFound, match="no FineTuneJob nix in namespace research"):
            call("nix")


def test_jobs_are_listed_by_namespace_and_name(api: FakeApi, client: FineTuneClient) -> None:
    for namespace, name in (("team-b", "a"), ("research", "z"), ("research", "b")):
        api.put({"metadata": {"name": name, "namespace": namespace}, "spec": job_spec()})
    assert [job.name for job in client.list()] == ["b", "z"]
    assert [(job.namespace, job.name) for job in client.list(all_namespaces=True)] == [
        ("research", "b"),
        ("research", "z"),
        ("team-b", "a"),
    ]


def test_wait_sees_every_change_and_returns_the_finished_job(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "new")
    writes = later(api, status_at("running"), status_at("finished"))
    phases = [job.phase for job in client.watch(client_jobs.NAME, timeout=PATIENCE_SECONDS)]
    writes.join()
    assert phases == ["Pending", "Training", "Succeeded"]
    assert client.wait(client_jobs.NAME, timeout=PATIENCE_SECONDS).succeeded


def test_wait_raises_what_the_operator_says_of_a_failure(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "failed")
    with pytest.raises(JobFailed, match=r"failed: OutOfDeviceMemory: .*microBatchSize") as caught:
        client.wait(client_jobs.NAME, timeout=PATIENCE_SECONDS)
    assert caught.value.job.current_stage is not None
    assert caught.value.job.current_stage.name == "train"


def test_wait_is_bounded_and_says_how_the_job_stands(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "queued")
    with pytest.raises(WaitTimeout, match=r"not finished after .*it is Queued \(Queued\): Stage prepare: couldn't"):
        client.wait(client_jobs.NAME, timeout=0.2)


def test_a_job_that_is_deleted_while_it_is_watched_is_told(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    threading.Timer(0.05, api.remove, ("research", client_jobs.NAME)).start()
    with pytest.raises(JobNotFound, match="was deleted"):
        client.wait(client_jobs.NAME, timeout=PATIENCE_SECONDS)


def test_a_finished_job_whose_spec_changed_is_not_finished(api: FakeApi, client: FineTuneClient) -> None:
    job = there(api, "finished")
    assert client.get(client_jobs.NAME).is_finished
    job["spec"]["training"]["maxSteps"] = 7
    job["metadata"]["generation"] = 2
    api.put(job)
    assert not client.get(client_jobs.NAME).is_finished


# ---- the cluster says no


def test_a_user_without_the_right_is_told_which_role_has_it(api: FakeApi, client: FineTuneClient) -> None:
    api.trouble = lambda method, path: 403
    with pytest.raises(Forbidden, match=r"cannot do that; ask for the chart's role finetune-operator-edit"):
        client.list()


def test_what_the_server_refuses_is_told_in_its_words(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    api.trouble = lambda method, path: 422 if method == "PATCH" else None
    with pytest.raises(Refused, match="no"):
        client.suspend(client_jobs.NAME)


def test_a_cluster_without_the_definition_is_told(kubeconfig: Path, api: FakeApi) -> None:
    config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    config["clusters"][0]["cluster"]["server"] += "/nowhere"
    kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(ClusterUnreachable, match="has no FineTuneJobs: install the chart"):
        FineTuneClient(kubeconfig=kubeconfig).list()


def test_a_stale_login_is_told(api: FakeApi, kubeconfig: Path) -> None:
    api.token = "fresh"
    with pytest.raises(ClusterUnreachable, match="does not know you"):
        FineTuneClient(kubeconfig=kubeconfig).list()


def test_the_users_token_is_sent(api: FakeApi, tmp_path: Path) -> None:
    api.token = "fresh"
    assert len(FineTuneClient(kubeconfig=api.kubeconfig(tmp_path / "mine")).list()) == 0


def test_a_server_that_is_away_is_told_at_once(tmp_path: Path) -> None:
    with serving(FakeApi()) as api:
        file = api.kubeconfig(tmp_path / "kubeconfig")
    with pytest.raises(ClusterUnreachable, match="does not answer"):
        FineTuneClient(kubeconfig=file).wait("tiny", timeout=PATIENCE_SECONDS)


def test_a_short_outage_in_a_watch_is_gone_over(
    api: FakeApi, client: FineTuneClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_client.cluster.RETRY_SECONDS", 0.01)
    there(api, "running")
    answers = iter([None, 503, 503, None, 500, None])
    api.trouble = lambda method, path: next(answers, None)
    later(api, status_at("finished")).join()
    assert client.wait(client_jobs.NAME, timeout=PATIENCE_SECONDS).succeeded


def test_no_kubeconfig_and_an_unknown_context_are_told(kubeconfig: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterUnreachable, match="kubeconfig cannot be used"):
        FineTuneClient(kubeconfig=tmp_path / "nix")
    with pytest.raises(ClusterUnreachable, match=r"no context 'prod'; it has: test"):
        FineTuneClient(kubeconfig=kubeconfig, context="prod")


# ---- logs


def pod(name: str, stage: str, attempt: int = 1, state: str = "terminated") -> Raw:
    return {
        "metadata": {
            "name": name,
            "namespace": "research",
            "uid": f"uid-{name}",
            "labels": {
                "finetune-operator.io/job-name": client_jobs.NAME,
                "finetune-operator.io/stage": stage,
                "finetune-operator.io/attempt": str(attempt),
            },
        },
        "status": {"containerStatuses": [{"name": "stage", "state": {state: {}}}]},
    }


def test_logs_are_of_the_current_stages_newest_attempt_with_the_pods_name(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    api.pods = [pod("p", "prepare"), pod("t1", "train"), pod("t2-0", "train", 2), pod("t2-1", "train", 2)]
    api.logs = {name: f"{name} one\n{name} two\n" for name in ("p", "t1", "t2-0", "t2-1")}
    assert list(client.logs(client_jobs.NAME)) == [
        "[t2-0] t2-0 one",
        "[t2-0] t2-0 two",
        "[t2-1] t2-1 one",
        "[t2-1] t2-1 two",
    ]
    assert list(client.logs(client_jobs.NAME, stage="prepare", tail=1)) == ["p two"]


def test_where_no_pod_is_left_the_lines_that_the_status_keeps_are_shown(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "failed")
    assert list(client.logs(client_jobs.NAME)) == list(client_jobs.LOG)


def test_a_stage_that_the_job_does_not_have_is_told(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    with pytest.raises(ClientError, match=r"no stage 'tran'; it has prepare, train, consolidate"):
        list(client.logs(client_jobs.NAME, stage="tran"))


def test_following_goes_through_all_pods_and_ends_with_the_job(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "finished")
    api.pods, api.logs = [pod("e", "evaluate")], {"e": "loss 1.3\n"}
    assert list(client.logs(client_jobs.NAME, stage="evaluate", follow=True)) == ["loss 1.3"]


def test_following_waits_for_a_pod_and_ends_when_its_stage_does(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    api.pods, api.logs = [pod("t", "train", 2, "running")], {"t": "step 1\nstep 2\n"}
    ends = later(api, status_at("finished"))
    assert list(client.logs(client_jobs.NAME, stage="train", follow=True)) == ["step 1", "step 2"]
    ends.join()


# ---- change


def operator_that_holds(job: Raw) -> Raw:
    """Suspends at once what asks for it, and begins again what is resumed."""
    generation = job["metadata"]["generation"]
    return status_at("suspended" if job["spec"].get("suspend") else "running", generation)


def test_suspend_and_resume_change_nothing_but_the_switch(api: FakeApi, client: FineTuneClient) -> None:
    before = there(api, "running")
    api.operator = operator_that_holds
    held = client.suspend(client_jobs.NAME, wait=PATIENCE_SECONDS)
    assert held.phase == "Suspended"
    resumed = client.resume(client_jobs.NAME)
    assert (resumed.is_suspended, resumed.generation) == (False, 3)
    assert {**resumed.plain_spec, "suspend": None} == {**before["spec"], "suspend": None}


def test_a_failed_job_is_tried_again_by_suspending_and_resuming_it(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "failed")
    api.operator = operator_that_holds
    again = client.retry(client_jobs.NAME, from_stage="train", timeout=PATIENCE_SECONDS)
    assert not again.is_suspended
    assert not client.get(client_jobs.NAME).is_finished
    assert [path for method, path in api.requests if method == "PATCH"] == [
        f"{JOBS}/{client_jobs.NAME}?fieldManager=finetune-client"
    ] * 2


@pytest.mark.parametrize(
    ("moment", "stage", "words"),
    [
        pytest.param("running", None, "has not failed, it is Training", id="a job that runs"),
        pytest.param("finished", None, "has not failed, it is Succeeded", id="a job that succeeded"),
        pytest.param("failed", "prepare", r"prepare is complete and is not run again.*go on with train", id="complete"),
        pytest.param("failed", "merge", "merge did not fail", id="a stage that waits"),
        pytest.param("failed", "nix", "has no stage 'nix'; it has prepare, train", id="no such stage"),
    ],
)
def test_what_cannot_be_tried_again_is_told_and_nothing_changed(
    api: FakeApi, client: FineTuneClient, moment: str, stage: str | None, words: str
) -> None:
    there(api, moment)
    with pytest.raises(NothingToRetry, match=words):
        client.retry(client_jobs.NAME, from_stage=stage)
    assert all(method == "GET" for method, _ in api.requests)


def test_a_retry_that_no_operator_takes_up_leaves_the_job_suspended_and_says_so(
    api: FakeApi, client: FineTuneClient
) -> None:
    there(api, "failed")
    with pytest.raises(WaitTimeout, match=r"not taken up by the operator.*stays suspended.*finetune resume"):
        client.retry(client_jobs.NAME, timeout=0.2)
    assert client.get(client_jobs.NAME).is_suspended


def test_a_job_that_is_refused_again_is_told_and_not_left_suspended(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "refused")
    api.operator = lambda job: status_at("refused", job["metadata"]["generation"])
    with pytest.raises(JobFailed, match=r"refused as it is: InvalidSpec: spec.accelerator.nodes"):
        client.retry(client_jobs.NAME, timeout=PATIENCE_SECONDS)
    assert not client.get(client_jobs.NAME).is_suspended


def test_delete_waits_until_the_job_is_gone(api: FakeApi, client: FineTuneClient) -> None:
    there(api, "running")
    client.delete(client_jobs.NAME, wait=PATIENCE_SECONDS)
    assert api.jobs == {}


# ---- plan and report


def test_a_plan_is_a_dry_run_under_a_name_of_its_own_and_is_gone_afterwards(
    api: FakeApi, client: FineTuneClient
) -> None:
    there(api, "running")
    asked: list[Raw] = []

    def operator(job: Raw) -> Raw:
        asked.append(job)
        return status_at("planned", job["metadata"]["generation"])

    api.operator = operator
    job = client.plan(client_jobs.body(), timeout=PATIENCE_SECONDS)
    assert job.status.plan is not None
    assert job.status.plan.cost is not None
    assert job.status.plan.cost.currency == "USD"
    (dry,) = asked
    assert dry["spec"]["dryRun"] is True
    assert dry["metadata"]["name"].startswith("llama3-8b-dolly-plan-")
    assert list(api.jobs) == [("research", client_jobs.NAME)], "what was there is untouched"


def test_a_plan_without_an_operator_says_what_else_there_is_and_leaves_nothing(
    api: FakeApi, client: FineTuneClient
) -> None:
    with pytest.raises(WaitTimeout, match="does the operator run.*--offline"):
        client.plan(client_jobs.body(), timeout=0.2)
    assert api.jobs == {}


def test_a_report_says_where_results_lie_and_finds_the_page(
    api: FakeApi, client: FineTuneClient, tmp_path: Path
) -> None:
    there(api, "finished")
    found = client.report(client_jobs.NAME, workspace=tmp_path)
    assert (found.claim, found.folder, found.page) == ("workspace", "finetune/jobs/research/llama3-8b-dolly", None)
    assert list(found.artifacts) == ["adapter", "model", "evaluation", "prepare", "train"]
    assert found.evaluation is not None
    assert found.page_path == f"{found.folder}/{reporting.REPORT_FOLDER}/{reporting.PAGE_NAME}"
    page = tmp_path / found.page_path
    page.parent.mkdir(parents=True)
    page.write_text("<html>", encoding="utf-8")
    assert client.report(client_jobs.NAME, workspace=tmp_path).page == page


# ---- notebooks


def test_a_notebook_shows_a_table_and_nothing_of_it_is_markup_of_the_job(api: FakeApi, client: FineTuneClient) -> None:
    job = there(api, "running")
    job["status"]["message"] = "<script>alert(1)</script>"
    api.put(job)
    html = client.get(client_jobs.NAME)._repr_html_()
    assert "<progress" in html
    assert "52%" in html
    assert "prepare" in html
    assert "<script>" not in html
    assert "llama3-8b-dolly" in client.list()._repr_html_()
    assert repr(client.get(client_jobs.NAME)) == (
        "<FineTuneJob research/llama3-8b-dolly: Training, 2/5 train, 52%, Running>"
    )
