"""The pipeline in the large: whole jobs walked through a simulated namespace."""

from __future__ import annotations

from datetime import timedelta

import pytest
from simulated import Simulation, successful_report
from workloads import evicted, readmitted, reserved, workload

from finetune_operator.api import constants
from finetune_operator.api.conditions import find_condition
from finetune_operator.api.status import Cost
from finetune_operator.core.figures import Progress
from finetune_operator.core.plan import derive_cost
from finetune_operator.core.records import ANNOTATION_OUTCOME
from finetune_operator.core.times import format_time
from finetune_trainer.contract import ExitCode

STAGES = ("prepare", "train", "consolidate", "merge", "evaluate")


def states(simulation: Simulation) -> dict[str, str]:
    return {each["name"]: each["state"] for each in simulation.body["status"]["stages"]}


def walk(simulation: Simulation, *stages: str) -> None:
    for stage in stages:
        simulation.settle()
        simulation.run_stage(stage)
    simulation.settle()


def test_a_job_walks_its_stages_one_after_another() -> None:
    simulation = Simulation()
    walk(simulation, *STAGES)
    assert [name.split("-")[1] for name in simulation.created_jobs] == list(STAGES)
    assert states(simulation) == dict.fromkeys(STAGES, "Succeeded")
    assert simulation.body["status"]["phase"] == "Succeeded"
    assert len(simulation.services) == 1


def test_the_next_jobs_objects_are_asked_for_when_the_pods_have_ended_and_the_job_is_not_complete_yet() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.run_stage("prepare")
    _, desired = simulation.decide()
    assert [manifest["kind"] for manifest in desired.manifests] == ["Service", "Job"]
    assert desired.records == desired.late_records == (), "the record of a success costs no write of its own"
    assert [record.attempt[0] for record in desired.carried] == ["prepare"], "written where it cannot be made"


def lose_pods(simulation: Simulation, stage: str) -> None:
    for pod in simulation.pods_of(stage):
        del simulation.pods[pod["metadata"]["name"]]


def is_recorded(simulation: Simulation, stage: str) -> bool:
    (job,) = (job for job in simulation.jobs.values() if job["metadata"]["labels"][constants.LABEL_STAGE] == stage)
    return ANNOTATION_OUTCOME in job["metadata"]["annotations"]


def test_a_success_outlives_its_pods_on_the_next_stages_job() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    assert not is_recorded(simulation, "prepare")
    lose_pods(simulation, "prepare")
    walk(simulation, *STAGES[1:])
    assert [name.split("-")[1] for name in simulation.created_jobs] == list(STAGES), "nothing ran twice"


def test_the_last_stages_success_is_recorded_on_its_own_job() -> None:
    simulation = Simulation()
    walk(simulation, *STAGES)
    assert [stage for stage in STAGES if is_recorded(simulation, stage)] == ["evaluate"]


def test_a_job_that_goes_hands_back_what_it_remembers() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    simulation.change(suspend=True)
    simulation.settle()
    training = {**simulation.body["spec"]["training"], "learningRate": 0.25}
    simulation.change(suspend=True, training=training)
    simulation.settle()
    assert "train" not in {job["metadata"]["labels"][constants.LABEL_STAGE] for job in simulation.jobs.values()}
    assert is_recorded(simulation, "prepare")
    lose_pods(simulation, "prepare")
    simulation.change(suspend=False, training=training)
    simulation.settle()
    assert [name.split("-")[1] for name in simulation.created_jobs] == ["prepare", "train", "train"]


def test_a_failure_is_recorded_before_anything_else_is_done() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.fail_stage("prepare", 4)
    _, desired = simulation.decide()
    assert [record.kind for record in desired.records] == ["Job"]
    assert desired.late_records == ()


def test_a_stage_waits_for_all_of_its_pods() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    first, _ = simulation.pods_of("train")
    simulation.end_pod(first, 0, successful_report("train"))
    simulation.settle()
    assert len(simulation.jobs) == 2


def test_switched_off_stages_are_skipped() -> None:
    simulation = Simulation()
    simulation.change(merge={"enabled": False}, evaluate={"enabled": False, "prompts": None})
    walk(simulation, "prepare", "train", "consolidate")
    assert states(simulation)["merge"] == "Skipped"
    assert simulation.body["status"]["phase"] == "Succeeded"


def test_a_job_whose_pods_are_refused_says_where_to_look() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.pods.clear()
    pipeline, _ = simulation.decide()
    assert pipeline.wake_at == simulation.now + timedelta(seconds=10)
    status = simulation.settle(10)
    assert f"kubectl describe job {simulation.created_jobs[0]}" in (status.message or "")


def test_a_users_error_fails_the_job_at_once() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.fail_stage("prepare", ExitCode.USER_ERROR)
    status = simulation.settle()
    assert (status.phase, status.reason) == ("Failed", "UserError")
    assert len(simulation.created_jobs) == 1


def test_a_spec_corrected_after_a_failure_runs_again() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    simulation.fail_stage("train", ExitCode.USER_ERROR)
    simulation.settle()
    simulation.change(training={"learningRate": 0.0005})
    status = simulation.settle()
    assert status.phase == "Training"
    assert states(simulation)["prepare"] == "Succeeded"
    assert status.completion_time is None


def test_the_same_spec_suspended_and_resumed_forgives_a_failure() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.fail_stage("prepare", ExitCode.USER_ERROR)
    simulation.settle()
    simulation.change(suspend=True)
    simulation.settle()
    simulation.change(suspend=False)
    status = simulation.settle()
    assert status.phase == "Preparing"
    assert simulation.created_jobs[-1].endswith("-2")


def test_counted_failures_wait_longer_each_time_and_then_end_the_job() -> None:
    simulation = Simulation()
    simulation.change(retryPolicy={"maxRetries": 2})
    simulation.settle()
    for attempt, seconds in ((1, 10), (2, 20)):
        simulation.fail_stage("prepare", ExitCode.RETRYABLE)
        assert simulation.settle().stages[0].state == "Retrying"
        assert simulation.settle(seconds - 1).stages[0].state == "Retrying"
        assert simulation.settle(0.2 * seconds + 1).stages[0].attempt == attempt + 1
    simulation.fail_stage("prepare", ExitCode.RETRYABLE)
    status = simulation.settle()
    assert (status.phase, status.reason) == ("Failed", "RetriesExhausted")
    assert "maxRetries is 2" in (status.message or "")
    assert status.restarts == 3


def test_infrastructure_faults_use_up_no_retry() -> None:
    simulation = Simulation()
    simulation.change(retryPolicy={"maxRetries": 0})
    walk(simulation, "prepare")
    for _ in range(4):
        simulation.fail_stage("train", ExitCode.INTERRUPTED)
        simulation.settle()
        simulation.settle(60)
    assert simulation.body["status"]["phase"] == "Training"
    assert simulation.body["status"]["restarts"] == 4
    assert all(not attempt["counted"] for attempt in simulation.body["status"]["attempts"])


def test_the_next_attempt_waits_for_the_last_pod_of_the_one_before() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    first, second = simulation.pods_of("train")
    simulation.end_pod(first, ExitCode.RETRYABLE)
    second["metadata"]["deletionTimestamp"] = "2026-01-02T03:09:05Z"
    simulation.settle(600)
    assert len(simulation.jobs) == 2
    del simulation.pods[second["metadata"]["name"]]
    simulation.settle()
    assert simulation.created_jobs[-1].endswith("-2")


def test_a_job_deleted_by_hand_is_made_again() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.delete_job(simulation.created_jobs[0])
    simulation.settle()
    assert simulation.created_jobs == [simulation.created_jobs[0]] * 2


def test_suspension_stops_the_running_stage_and_resume_goes_on_with_the_next_attempt() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    simulation.change(suspend=True)
    status = simulation.settle()
    assert status.phase == "Suspended"
    assert simulation.pods_of("train") == []
    simulation.change(suspend=False)
    status = simulation.settle()
    train = next(stage for stage in status.stages if stage.name == "train")
    assert (train.state, train.attempt) == ("Starting", 2)
    assert status.restarts == 0


def test_a_change_under_suspension_runs_only_what_reads_it() -> None:
    simulation = Simulation()
    walk(simulation, "prepare", "train", "consolidate", "merge")
    simulation.change(suspend=True)
    simulation.settle()
    simulation.change(suspend=False, evaluate={"maxNewTokens": 8})
    simulation.settle()
    assert [name.split("-")[1] for name in simulation.created_jobs] == [*STAGES, "evaluate"]
    assert len([name for name in simulation.jobs if "evaluate" in name]) == 1, "the stale one is gone"


def test_a_passed_deadline_stops_what_runs_and_then_fails() -> None:
    simulation = Simulation()
    simulation.change(activeDeadlineSeconds=60)
    simulation.settle()
    pipeline, _ = simulation.decide()
    assert pipeline.wake_at == simulation.now + timedelta(seconds=60)
    status = simulation.settle(61)
    assert (status.phase, status.reason) == ("Failed", "DeadlineExceeded")
    assert simulation.pods == {}
    simulation.change(activeDeadlineSeconds=600)
    assert simulation.settle().stages[0].attempt == 2, "what was stopped goes on, and is no restart"


def test_an_upgrade_of_the_operator_leaves_a_started_stage_alone() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    simulation.settings = type(simulation.settings)(trainer_image="registry.example/finetune-trainer:new")
    simulation.settle()
    assert len(simulation.created_jobs) == 2
    simulation.run_stage("train")
    simulation.settle()
    image = simulation.jobs[simulation.created_jobs[-1]]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "registry.example/finetune-trainer:new"


@pytest.mark.parametrize("suspended", [False, True], ids=["as it is", "after a suspension"])
def test_a_default_image_that_cannot_be_pulled_is_replaced_by_the_corrected_one(suspended: bool) -> None:
    simulation = Simulation()
    simulation.settle()
    (pod,) = simulation.pods_of("prepare")
    waiting = {"reason": "ImagePullBackOff", "message": "no such tag"}
    pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"waiting": waiting}}]
    if suspended:
        simulation.change(suspend=True)
        simulation.settle()
        simulation.change(suspend=False)
    simulation.settings = type(simulation.settings)(trainer_image="registry.example/finetune-trainer:right")
    simulation.settle()
    (job,) = simulation.jobs.values()
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/finetune-trainer:right"


def test_an_upgrade_while_the_job_is_suspended_leaves_a_started_stage_alone() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    for pod in simulation.pods_of("train"):
        pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"running": {}}}]
    simulation.change(suspend=True)
    simulation.settle()
    simulation.settings = type(simulation.settings)(trainer_image="registry.example/finetune-trainer:new")
    simulation.change(suspend=False)
    simulation.settle()
    before, after = simulation.created_jobs[1:]
    assert (before.removesuffix("-1"), after[-2:]) == (after.removesuffix("-2"), "-2"), "the same digest goes on"


def test_the_objects_of_endless_faults_of_the_infrastructure_do_not_heap_up() -> None:
    simulation = Simulation()
    walk(simulation, "prepare")
    for _ in range(30):
        simulation.fail_stage("train", ExitCode.INTERRUPTED)
        simulation.settle()
        status = simulation.settle(80)
    assert status.restarts == 30
    kept = [name for name in simulation.jobs if "train" in name]
    assert len(kept) == len(simulation.services) == 20
    assert len(status.attempts) == 19


@pytest.mark.parametrize(
    ("metrics", "phase"),
    [
        pytest.param({"baseLoss": 2.0, "tunedLoss": 1.0}, "Succeeded", id="a better model passes"),
        pytest.param({"baseLoss": 2.0, "tunedLoss": 2.1}, "Failed", id="a worse model fails"),
        pytest.param({}, "Failed", id="no figures fail"),
    ],
)
def test_the_gate_decides_by_the_losses(metrics: dict[str, float], phase: str) -> None:
    simulation = Simulation()
    simulation.change(evaluate={"gate": {"maxLossRatioToBase": 1.0}})
    walk(simulation, *STAGES[:-1])
    simulation.run_stage("evaluate", **metrics)
    status = simulation.settle()
    assert status.phase == phase
    reason = next(each.reason for each in status.conditions if each.type == constants.ConditionType.EVALUATED)
    assert reason == ("Completed" if phase == "Succeeded" else "GateNotMet")


HEALTH = "sagemaker.amazonaws.com/node-health-status"


def node(name: str, health: str | None = "Schedulable", ready: str = "True") -> dict[str, object]:
    labels = {"kubernetes.io/hostname": name, **({HEALTH: health} if health is not None else {})}
    return {
        "metadata": {"name": name, "uid": f"uid-of-{name}", "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def training() -> Simulation:
    """A job whose two training pods run on n1 and n2."""
    simulation = Simulation()
    simulation.nodes = {name: node(name) for name in ("n1", "n2", "n3")}
    walk(simulation, "prepare")
    for pod, name in zip(simulation.pods_of("train"), ("n1", "n2"), strict=True):
        pod["spec"]["nodeName"] = name
        pod["status"]["containerStatuses"] = [{"name": "stage", "state": {"running": {}}}]
    simulation.settle()
    return simulation


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        pytest.param(
            lambda s: s.nodes["n2"]["metadata"]["labels"].update({HEALTH: "UnschedulablePendingReplacement"}),
            "NodeFault",
            "UnschedulablePendingReplacement",
            id="a label of HyperPod",
        ),
        pytest.param(
            lambda s: s.nodes.update(n2=node("n2", ready="Unknown")), "NodeLost", "n2", id="a node that is not ready"
        ),
        pytest.param(
            lambda s: (s.nodes.pop("n2"), s.deleted_nodes.add("n2")), "NodeLost", "n2", id="a node that is deleted"
        ),
    ],
)
def test_a_faulty_node_ends_the_attempt_at_once_and_costs_no_retry(change: object, reason: str, words: str) -> None:
    simulation = training()
    simulation.change(retryPolicy={"maxRetries": 0})
    change(simulation)  # type: ignore[operator]
    first = simulation.step()
    simulation.settle()
    status = simulation.settle(5)
    (attempt,) = status.attempts
    assert (attempt.reason, attempt.node, attempt.counted) == (reason, "n2", False)
    assert attempt.end_time == first.attempts[0].end_time is not None, "told once"
    assert words in attempt.message
    assert simulation.created_jobs[-1].endswith("-2")
    assert status.phase == "Training"


def test_the_next_attempt_keeps_to_healthy_nodes_and_prefers_others_than_the_faulty_one() -> None:
    simulation = training()
    simulation.nodes["n2"]["metadata"]["labels"][HEALTH] = "Unschedulable"
    simulation.settle()
    simulation.settle(5)
    affinity = simulation.jobs[simulation.created_jobs[-1]]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": HEALTH, "operator": "In", "values": ["Schedulable"]} in term["matchExpressions"]
    assert "n2" in str(affinity["preferredDuringSchedulingIgnoredDuringExecution"])


def test_lost_steps_are_told_when_the_pods_that_may_still_write_a_checkpoint_are_gone() -> None:
    simulation = training()
    simulation.progress = Progress("train", 1, step=7, total_steps=40, checkpoint_step=5, advanced_at=simulation.now)
    for pod in simulation.pods_of("train"):
        pod["metadata"].update(
            deletionTimestamp=format_time(simulation.now + timedelta(seconds=20)), deletionGracePeriodSeconds=20
        )
    simulation.nodes["n2"]["metadata"]["labels"][HEALTH] = "Unschedulable"
    (attempt,) = simulation.settle().attempts
    assert (attempt.reason, attempt.lost_steps) == ("NodeFault", None)

    simulation.progress = Progress("train", 1, step=8, total_steps=40, checkpoint_step=8, advanced_at=simulation.now)
    for pod in simulation.pods_of("train"):
        simulation.end_pod(pod, ExitCode.INTERRUPTED)
    (attempt,) = simulation.settle(3).attempts
    assert (attempt.reason, attempt.lost_steps) == ("NodeFault", 0)


def test_pods_that_no_kubelet_ends_delay_the_next_attempt_by_less_than_half_a_minute() -> None:
    """Promise 7: the gang is there again within 30 seconds of a node's fault, with the defaults."""
    simulation = training()
    for pod in simulation.pods_of("train"):
        pod["metadata"].update(
            deletionTimestamp=format_time(simulation.now + timedelta(seconds=20)), deletionGracePeriodSeconds=20
        )
    simulation.nodes["n2"]["metadata"]["labels"][HEALTH] = "Unschedulable"
    simulation.settle()
    for _ in range(28):
        simulation.settle(1)
    assert simulation.created_jobs[-1].endswith("-2")
    assert simulation.pods_of("train")[0]["metadata"]["labels"][constants.LABEL_ATTEMPT] == "2"


def test_pods_that_wait_for_a_node_are_told_which_ones_hyperpod_holds_back() -> None:
    simulation = training()
    simulation.nodes["n2"]["metadata"]["labels"][HEALTH] = "UnschedulablePendingReboot"
    simulation.settle()
    simulation.settle(5)
    words = "0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector."
    for pod in simulation.pods_of("train"):
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
        pod["status"]["conditions"] = [condition]
    status = simulation.settle()
    assert status.reason == "Unschedulable"
    assert status.message is not None
    assert words in status.message
    assert "HyperPod keeps pods off node n2 (UnschedulablePendingReboot)" in status.message


def test_without_the_label_on_any_node_none_is_required() -> None:
    simulation = Simulation()
    simulation.nodes = {"n1": node("n1", health=None)}
    simulation.settle()
    (job,) = simulation.jobs.values()
    assert "affinity" not in job["spec"]["template"]["spec"]


def test_a_training_that_makes_no_step_for_too_long_hangs_and_is_stopped() -> None:
    simulation = training()
    simulation.change(stages={"train": {"hangSeconds": 60}})
    simulation.progress = Progress("train", 1, step=7, total_steps=40, checkpoint_step=5, advanced_at=simulation.now)
    pipeline, _ = simulation.decide()
    assert pipeline.wake_at == simulation.now + timedelta(seconds=60)
    assert simulation.settle(59).attempts == ()
    status = simulation.settle(2)
    (attempt,) = status.attempts
    assert (attempt.reason, attempt.counted, attempt.lost_steps) == ("Hanging", True, 2)
    assert "step 7" in attempt.message


def test_a_job_without_posts_is_not_judged_by_its_silence() -> None:
    simulation = training()
    simulation.change(stages={"train": {"hangSeconds": 60}})
    assert simulation.settle(600).attempts == ()


def test_only_another_time_to_live_does_not_run_a_failed_job_again() -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.fail_stage("prepare", ExitCode.USER_ERROR)
    assert simulation.settle().phase == "Failed"
    simulation.change(ttlSecondsAfterFinished=60)
    simulation.settle()
    assert simulation.body["status"]["phase"] == "Failed"
    assert len(simulation.created_jobs) == 1


def test_every_missed_threshold_is_told_and_nothing_after_evaluate_runs() -> None:
    simulation = Simulation()
    gate = {"maxLossRatioToBase": 0.9, "maxLoss": 1.2, "maxPerplexity": 4, "minExactMatch": 0.5, "minRougeL": 0.5}
    simulation.change(evaluate={"gate": gate}, publish={"s3": {"uri": "s3://bucket/models/tiny"}})
    walk(simulation, *STAGES[:-1])
    scores = {"tunedExactMatch": 0.25, "tunedRougeL": 0.75, "promptsCompared": 4}
    simulation.run_stage("evaluate", baseLoss=2.0, tunedLoss=1.5, tunedPerplexity=4.481689, **scores)
    status = simulation.settle()
    assert status.phase == "Failed"
    condition = find_condition(status.conditions, constants.ConditionType.EVALUATED)
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", "GateNotMet")
    assert condition.message == (
        "The tuned model's held-out loss is 1.5; spec.evaluate.gate.maxLoss allows 1.2. "
        "The tuned model's held-out perplexity is 4.481689; spec.evaluate.gate.maxPerplexity allows 4.0. "
        "The tuned model's exact match is 0.25, the mean over 4 prompts with an expected answer; "
        "spec.evaluate.gate.minExactMatch asks for 0.5. Train longer or on better data, or change the gate."
    )
    assert not any("publish" in name for name in simulation.jobs)
    assert status.evaluation is not None
    assert status.evaluation.as_json() == {
        "baseLoss": 2.0,
        "tunedLoss": 1.5,
        "tunedPerplexity": 4.4817,
        "promptsCompared": 4,
        "tunedExactMatch": 0.25,
        "tunedRougeL": 0.75,
        "prompts": [],
    }


def test_another_gate_measures_nothing_anew() -> None:
    simulation = Simulation()
    simulation.change(evaluate={"gate": {"maxLossRatioToBase": 0.4}})
    walk(simulation, *STAGES[:-1])
    simulation.run_stage("evaluate", baseLoss=2.0, tunedLoss=1.0)
    assert simulation.settle().phase == "Failed"
    simulation.change(evaluate={"gate": {"maxLossRatioToBase": 0.6}})
    assert simulation.settle().phase == "Succeeded"
    assert len(simulation.created_jobs) == len(STAGES)


def pipeline_with_quota() -> Simulation:
    """A training that runs in a reservation of the whole pipeline."""
    simulation = Simulation(kueue_installed=True)
    simulation.change(queue={"name": "research", "policy": "wholePipeline"})
    simulation.workloads[simulation.job.uid] = workload(*reserved(0))
    walk(simulation, "prepare")
    return simulation


def test_a_whole_pipeline_starts_nothing_without_its_reservation() -> None:
    simulation = Simulation(kueue_installed=True)
    simulation.change(queue={"name": "research", "policy": "wholePipeline"})
    assert simulation.settle().phase == "Queued"
    simulation.workloads[simulation.job.uid] = workload(*reserved(0))
    simulation.settle()
    assert len(simulation.created_jobs) == 1


def test_a_reservation_that_is_taken_back_ends_the_attempt_and_costs_no_retry() -> None:
    simulation = pipeline_with_quota()
    simulation.workloads[simulation.job.uid] = workload(*reserved(0), evicted("Preempted", "for another", 60))
    status = simulation.settle(60)
    assert [(each.stage, each.reason, each.counted) for each in status.attempts] == [("train", "Preempted", False)]
    assert (status.reason, simulation.pods_of("train")) == ("Preempted", [])
    assert simulation.settle(60).phase == "Queued"
    simulation.workloads[simulation.job.uid] = workload(*reserved(150))
    simulation.settle(60)
    assert [name.rsplit("-", 1)[1] for name in simulation.created_jobs] == ["1", "1", "2"]


def test_what_runs_in_a_reservation_goes_on_when_kueue_is_removed_and_the_next_stage_waits() -> None:
    simulation = pipeline_with_quota()
    simulation.kueue_installed = False
    simulation.workloads.clear()
    status = simulation.settle()
    assert (status.phase, status.attempts, len(simulation.pods_of("train"))) == ("Training", (), 2)
    walk(simulation, "train")
    status = simulation.settle()
    assert (status.phase, "no Kueue" in (status.message or "")) == ("Queued", True)
    assert len(simulation.created_jobs) == 2


def scheduled(simulation: Simulation, stage: str) -> None:
    """Every pod of the stage is given a node now."""
    for pod in simulation.pods_of(stage):
        at = format_time(simulation.now)
        pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": at}]


def test_the_time_for_which_pods_had_their_nodes_is_kept_when_the_pods_are_gone() -> None:
    simulation = Simulation()
    simulation.settle(30)
    scheduled(simulation, "prepare")
    simulation.now += timedelta(seconds=60)
    simulation.run_stage("prepare")
    simulation.settle()
    scheduled(simulation, "train")
    simulation.now += timedelta(seconds=100)
    simulation.fail_stage("train", ExitCode.RETRYABLE)
    simulation.settle()
    simulation.pods.clear()
    outcomes = simulation.decide()[0].outcomes
    assert {stage: outcome.pod_seconds for (stage, _, _), outcome in outcomes.items()} == {"prepare": 60, "train": 100}
    assert derive_cost(outcomes, None, "USD") == Cost(pod_seconds=160)


def test_a_suspended_attempts_time_is_kept_too() -> None:
    simulation = Simulation()
    simulation.settle()
    scheduled(simulation, "prepare")
    simulation.now += timedelta(seconds=45)
    simulation.change(suspend=True)
    simulation.settle()
    (outcome,) = simulation.decide()[0].outcomes.values()
    assert (outcome.reason, outcome.pod_seconds) == ("Suspended", 45)


def test_a_preemption_that_no_operator_saw_is_told_although_the_stage_has_ended_since() -> None:
    simulation = Simulation(kueue_installed=True)
    simulation.change(queue={"name": "research"})
    simulation.settle()
    [name] = simulation.created_jobs
    simulation.jobs[name]["spec"]["suspend"] = False
    simulation.run_stage("prepare")
    simulation.workloads[f"uid-of-{name}"] = readmitted("for another", again=30)
    status = simulation.settle(60)
    assert [(each.stage, each.attempt, each.reason) for each in status.attempts] == [("prepare", 1, "Preempted")]
    assert status.stages[0].state == "Succeeded"
