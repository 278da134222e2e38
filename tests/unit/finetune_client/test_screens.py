"""Every screen as a person sees it, for jobs at each moment of their lives; `make golden` rewrites them."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import client_jobs
import pytest
from fake_api import FakeApi
from rich.console import Console, RenderableType

from finetune_client import FineTuneClient, screens
from finetune_client.job import Job, JobList
from finetune_client.runbook import entries
from finetune_operator.api.constants import Reason

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "client"


def shown(what: RenderableType, width: int = 80, *, ascii_only: bool = False) -> str:
    """The screen as text; no line is wider than the terminal."""
    console = Console(width=width, highlight=False, markup=False, emoji=False, force_terminal=False, color_system=None)
    options = console.options.update(width=width)
    if ascii_only:
        options.encoding = "ascii"
    lines = ["".join(segment.text for segment in line).rstrip() for line in console.render_lines(what, options)]
    assert max(map(len, lines)) <= width
    return "\n".join(lines) + "\n"


def compare(name: str, text: str) -> None:
    text = re.sub(r"-[0-9a-f]{8}-(?=\d)", "-01234567-", text)  # digests change with whatever stages read
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs: run `make golden` and review the diff"


@pytest.mark.parametrize("moment", client_jobs.MOMENTS)
def test_golden_screens_of_a_job(moment: str) -> None:
    job, now = client_jobs.job_at(moment)
    text = "".join(
        f"$ finetune {command} {job.name}\n{shown(screen(job, now))}\n"
        for command, screen in (("status", screens.status_screen), ("why", screens.why_screen))
    )
    compare(moment, text)


def all_jobs() -> JobList:
    jobs = []
    for moment in client_jobs.MOMENTS:
        body = client_jobs.job_at(moment)[0].raw
        jobs.append(Job({**body, "metadata": {**body["metadata"], "name": moment.replace("_", "-")}}))
    return JobList(jobs)


def test_golden_list() -> None:
    jobs, now = all_jobs(), client_jobs.job_at("running")[1]
    text = (
        f"$ finetune list\n{shown(screens.list_table(jobs, now))}\n"
        f"$ finetune list -A\n{shown(screens.list_table(jobs, now, namespaces=True))}\n"
        f"$ finetune list -o wide\n{shown(screens.list_table(jobs, now, wide=True), 120)}"
    )
    compare("list", text)


def test_golden_plan_and_report(api: FakeApi, client: FineTuneClient) -> None:
    plans = [client_jobs.job_at(moment)[0] for moment in ("planned", "planned_too_large")]
    text = "".join(
        f"$ finetune plan job.yaml\n{shown(screens.plan_screen(job.name, job.status.plan))}\n"
        for job in plans
        if job.status.plan is not None
    )
    for moment in ("finished", "running"):
        client_jobs.there(api, moment)
        text += (
            f"$ finetune report {client_jobs.NAME}\n{shown(screens.report_screen(client.report(client_jobs.NAME)))}\n"
        )
    compare("plan-report", text)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_screen_is_wider_than_the_terminal_and_status_fits_it(width: int) -> None:
    for moment in client_jobs.MOMENTS:
        job, now = client_jobs.job_at(moment)
        text = shown(screens.status_screen(job, now), width)
        shown(screens.why_screen(job, now), width)
        assert width < 80 or text.count("\n") <= 40, moment


def test_a_terminal_without_the_signs_gets_letters() -> None:
    job, now = client_jobs.job_at("running")
    assert shown(screens.status_screen(job, now), ascii_only=True).isascii()


def test_a_log_cannot_drive_the_terminal() -> None:
    job, now = client_jobs.job_at("failed")
    job.raw["status"]["stages"][1]["log"] = ["\x1b[2Jgone\x07", "tab\tstays"]
    text = shown(screens.why_screen(job, now))
    assert "\x1b" not in text
    assert "\\x1b[2Jgone\\x07" in text


def test_a_job_whose_spec_and_status_no_release_knows_is_shown_all_the_same() -> None:
    job = Job({"metadata": {"name": "odd"}, "spec": {"model": 3}, "status": {"phase": "Dreaming"}})
    now = client_jobs.START
    assert "odd" in shown(screens.status_screen(job, now))
    assert "odd" in shown(screens.list_table(JobList([job]), now, wide=True))


def test_a_stage_that_ended_long_ago_and_many_attempts_do_not_push_the_rest_away() -> None:
    job, now = client_jobs.job_at("exhausted")
    status = job.raw["status"]
    status["attempts"] = [{**status["attempts"][0], "attempt": number} for number in range(1, 21)]
    text = shown(screens.status_screen(job, now))
    assert "and 14 before these" in text
    assert text.count("CollectiveTimeout") < 10


def test_every_reason_of_the_operator_that_is_a_failure_has_cause_and_cure() -> None:
    healthy = {"Valid", "Pending", "DryRun", "Waiting", "Starting", "Running", "Completed", "Reused", "Skipped"}
    healthy |= {"NotSuspended", "Suspending", "Suspended", "Retrying"}
    found = entries()
    assert {str(reason) for reason in Reason} - healthy - set(found) == set()
    assert [entry.reason for entry in found.values() if not (entry.cause and entry.cure)] == []


def test_colours_are_never_the_only_sign_and_none_is_unreadable_on_a_light_or_a_dark_terminal() -> None:
    job, now = client_jobs.job_at("failed")
    console = Console(
        width=80, force_terminal=True, color_system="256", highlight=False, record=True, file=io.StringIO()
    )
    console.print(screens.status_screen(job, now))
    text = console.export_text(styles=True)
    assert "\x1b[1;31m" in text, "what failed is red"
    for unreadable in ("\x1b[33m", "\x1b[93m", "\x1b[97m", "\x1b[37m", "\x1b[30m"):
        assert unreadable not in text
