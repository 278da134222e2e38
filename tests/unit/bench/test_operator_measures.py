"""The numbers of bench/operator: requests without noise, quantiles, and which span is called a hand-off."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
from measures import Run, cpu_seconds, parse_requests, peak_memory_mb, quantile, requests_table, result

METRICS = """\
# HELP apiserver_request_total [STABLE] Counter of apiserver requests
# TYPE apiserver_request_total counter
apiserver_request_total{code="201",component="apiserver",dry_run="",group="batch",resource="jobs",scope="resource",subresource="",verb="POST",version="v1"} 7
apiserver_request_total{code="409",component="apiserver",dry_run="",group="batch",resource="jobs",scope="resource",subresource="",verb="POST",version="v1"} 2
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 14
apiserver_request_total{code="201",component="apiserver",dry_run="",group="",resource="events",scope="resource",subresource="",verb="POST",version="v1"} 3
apiserver_request_total{code="201",component="apiserver",dry_run="",group="events.k8s.io",resource="events",scope="resource",subresource="",verb="POST",version="v1"} 4
apiserver_request_total{code="0",component="apiserver",dry_run="",group="",resource="pods",scope="cluster",subresource="",verb="WATCH",version="v1"} 99
apiserver_request_total{code="200",component="apiserver",dry_run="",group="coordination.k8s.io",resource="leases",scope="resource",subresource="",verb="PUT",version="v1"} 1.234e+06
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="nodes",scope="resource",subresource="status",verb="PATCH",version="v1"} 50
apiserver_request_total{code="200",component="",dry_run="",group="",resource="",scope="",subresource="/readyz",verb="GET",version=""} 1000
apiserver_request_total{code="201",component="apiserver",dry_run="All",group="batch",resource="jobs",scope="resource",subresource="",verb="POST",version="v1"} 5
apiserver_request_duration_seconds_count{verb="POST",resource="jobs"} 9
"""  # noqa: E501  as the API server writes it


def run(arm: str, **changes: Any) -> Run:
    return Run(
        **{
            "arm": arm,
            "jobs": 10,
            "seconds": 2.0,
            "hand_offs_after_end": (1.0, 1.2),
            "hand_offs_after_complete": (0.1, 0.2),
            "requests": {"POST jobs": 70},
            "cpu_seconds": 5.0,
            "memory_mb": 100.0,
            "errors": 0,
            **changes,
        }
    )


def test_requests_are_counted_by_verb_and_resource_without_watches_leases_heartbeats_and_probes() -> None:
    assert parse_requests(METRICS) == {
        "POST jobs": 9,
        "PATCH pods/status": 14,
        "POST events": 3,
        "POST events.events.k8s.io": 4,
    }


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param([3.0, 1.0, 2.0], 0.5, 2.0, id="the middle of three"),
        pytest.param([float(n) for n in range(100)], 0.95, 95.0, id="the 96th of a hundred"),
        pytest.param([7.0], 0.95, 7.0, id="the only one"),
    ],
)
def test_a_quantile_is_one_of_the_values(values: list[float], share: float, expected: float) -> None:
    assert quantile(values, share) == expected


def test_nothing_has_no_quantile() -> None:
    assert math.isnan(quantile([], 0.95))


def test_a_hand_off_begins_with_what_the_arm_acts_on() -> None:
    assert run("floor").own_hand_offs == (0.1, 0.2)
    assert run("operator").own_hand_offs == (1.0, 1.2)


def test_the_result_compares_medians_of_both_arms_and_adds_all_errors() -> None:
    floor = [run("floor", seconds=2.0), run("floor", seconds=4.0)]
    ours = [
        run("operator", seconds=4.0, requests={"POST jobs": 70, "PATCH jobs": 14}, memory_mb=120.0),
        run("operator", seconds=8.0, requests={"POST jobs": 70, "PATCH jobs": 14}, memory_mb=110.0, errors=2),
    ]
    light = [run("floor"), run("operator", hand_offs_after_end=(0.25,), errors=1)]
    assert result([floor[0], ours[0], floor[1], ours[1]], light) == {
        "rate_to_floor": 0.5,
        "requests_to_floor": 1.2,
        "handoff_p95_to_floor": 6.0,
        "handoff_p95_from_container_end_to_floor": 1.0,
        "handoff_p95_light_s": 0.25,
        "memory_mb": 120.0,
        "cpu_s_per_job": 0.5,
        "errors": 3,
    }


def test_a_run_tells_its_requests_by_verb_per_job() -> None:
    requests = {"POST jobs": 70, "POST pods": 70, "PUT jobs/status": 155}
    line = run("floor", requests=requests, components={"etcd": 1.5}).as_json()
    assert line["requests_per_job_by_verb"] == {"POST": 14.0, "PUT": 15.5}
    assert line["requests_per_job"] == 29.5
    assert line["cluster_cpu_s_per_job"] == {"etcd": 0.15}
    assert line["jobs_per_s"] == 5.0


def test_the_table_leaves_out_what_happened_hardly_ever() -> None:
    table = requests_table(run("floor", requests={"POST jobs": 70, "GET namespaces": 0}), run("operator"))
    assert [line.split() for line in table.splitlines()[1:]] == [["POST", "jobs", "7.00", "7.00"]]


def test_a_process_has_used_time_and_memory() -> None:
    assert cpu_seconds(os.getpid()) > 0
    assert 5 < peak_memory_mb(os.getpid()) < 5000
