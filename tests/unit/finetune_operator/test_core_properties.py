"""Properties of the pure core, for random histories: determinism, no mutation, settling, no duplicate Job."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import Simulation

from finetune_trainer.contract import ExitCode

CODES = (*(int(code) for code in ExitCode), 137, 2)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.just(0)),
        st.tuples(st.just("fail"), st.sampled_from(CODES[1:])),
        st.tuples(st.just("wait"), st.integers(1, 700)),
        st.tuples(st.just("delete"), st.just(0)),
        st.tuples(st.just("suspend"), st.just(0)),
        st.tuples(st.just("resume"), st.just(0)),
        st.tuples(st.just("die"), st.integers(0, 4)),
        st.tuples(st.just("lose pods"), st.just(0)),
    ),
    max_size=12,
)


def play(simulation: Simulation, move: str, value: int) -> None:
    current = (simulation.body.get("status") or {}).get("stage", "1/5 prepare").split()[-1]
    pods = [pod for pod in simulation.pods_of(current) if pod["status"]["phase"] == "Pending"]
    if move == "run" and pods:
        simulation.run_stage(current)
    elif move == "fail" and pods:
        simulation.fail_stage(current, value)
    elif move == "delete" and simulation.jobs:
        simulation.delete_job(max(simulation.jobs))
    elif move in ("suspend", "resume"):
        simulation.change(suspend=move == "suspend")
    elif move == "lose pods":
        for pod in pods:
            simulation.jobs[pod["metadata"]["labels"]["job-name"]]["status"] = {
                "conditions": [
                    {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "gone"}
                ]
            }
            del simulation.pods[pod["metadata"]["name"]]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_any_history_keeps_one_job_an_attempt_and_can_still_succeed(history: list[tuple[str, int]]) -> None:
    simulation = Simulation()
    simulation.settle()
    for move, value in history:
        if move == "die":
            simulation.step(upto=value)
            continue
        play(simulation, move, value)
        simulation.settle(value if move == "wait" else 0)  # asserts that nothing is asked for twice
        live = [pod for pod in simulation.pods.values() if pod["status"]["phase"] == "Pending"]
        assert len({pod["metadata"]["labels"]["job-name"] for pod in live}) <= 1, "one attempt at a time"
    simulation.change(suspend=False, retryPolicy={"maxRetries": 100})
    for _ in range(12):
        simulation.settle(700)
        play(simulation, "run", 0)
    assert simulation.settle().phase == "Succeeded"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_deciding_is_deterministic_and_changes_nothing(history: list[tuple[str, int]]) -> None:
    simulation = Simulation()
    for move, value in history:
        play(simulation, move, value)
        before = simulation.state()
        first, second = simulation.decide(), simulation.decide()
        assert first == second
        assert simulation.state() == before
        simulation.step()
