"""The demo's steps on a cluster, in the order in which they run: workspace, sources, job, watch, result.

demo.py calls run_demo. Each step is harmless when it was done before, so a demo that was stopped is simply run again.
Nothing here decides anything for the product: it applies the example and looks at its status, as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live

from finetune_demo import kubectl, manifests, result, view
from finetune_demo.problem import DemoProblem

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = Path("examples/tiny-cpu.yaml")
SOURCE_FILES = (
    Path("hack/demo/make_base_model.py"),
    Path("examples/data/finetune-faq.jsonl"),
    Path("examples/data/base-text.txt"),
)
CLUSTER_PY = "hack/cluster/cluster.py"
PREFIX = "finetune-operator.io"
TYPE = f"finetunejobs.{PREFIX}"

FIRST_LOOK_SECONDS = 60
"""By then the operator has looked at a new job, or it does not run."""
LOG_LINES = 15


@dataclass(frozen=True)
class Options:
    """What the command line says. `deadline_seconds` is for the whole demo."""

    namespace: str
    trainer_image: str
    existing_cluster: bool
    fresh: bool
    claim: str | None
    storage_class: str | None
    storage_size: str
    deadline_seconds: int


@dataclass
class Demo:
    """One run: options, console, and the clock that the deadline is measured on."""

    options: Options
    console: Console
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the demo's start."""
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def check_deadline(self, what: str) -> None:
        if self.elapsed > self.options.deadline_seconds:
            raise DemoProblem(
                f"{what} did not end within the demo's {self.options.deadline_seconds} s; the job runs on. Look at "
                f"`kubectl -n {self.options.namespace} get ftj,pods`, or give it longer with --deadline"
            )


def run_demo(options: Options, console: Console) -> None:
    """All steps; DemoProblem when one fails, with the reason and what to do next."""
    demo = Demo(options, console)
    example = yaml.safe_load((ROOT / EXAMPLE).read_text(encoding="utf-8"))
    name, claim = example["metadata"]["name"], options.claim or example["spec"]["workspace"]["claimName"]
    example["spec"]["workspace"]["claimName"] = claim
    demo.say(f"namespace {options.namespace}, workspace claim {claim}")
    kubectl.apply(manifests.namespace(options.namespace))
    _make_claim(demo, claim)
    if options.fresh:
        kubectl.run("delete", TYPE, name, "-n", options.namespace, "--ignore-not-found", "--wait")
    _make_sources(demo, name, claim)
    demo.say(f"kubectl apply -n {options.namespace} -f {EXAMPLE}")
    _apply_job(demo, example)
    job = _follow(demo, name)
    evaluation = _read_evaluation(demo, job, claim)
    demo.say("")
    for line in result.lines(job, evaluation, _place_of(demo, claim)):
        demo.say(line)
    demo.say(f"{'Demo':<14} {view.seconds(demo.elapsed)}")
    result.check(evaluation)


def _make_claim(demo: Demo, claim: str) -> None:
    """The workspace: a folder of this machine on the local cluster, a claim of a storage class elsewhere."""
    options = demo.options
    if kubectl.find("persistentvolumeclaim", claim, "-n", options.namespace) is not None:
        return
    if options.existing_cluster:
        kubectl.apply(manifests.claim(options.namespace, claim, options.storage_class, options.storage_size))
        return
    # A volume outlives its namespace and then belongs to a claim that is gone. Its folder stays when it is deleted.
    volume = kubectl.find("persistentvolume", f"{options.namespace}-{claim}")
    if volume is not None and volume.get("status", {}).get("phase") == "Released":
        kubectl.run("delete", "persistentvolume", volume["metadata"]["name"])
    command = ["python3", CLUSTER_PY, "workspace-pvc", "--namespace", options.namespace, "--name", claim]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoProblem(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    kubectl.run("apply", "-f", "-", stdin=done.stdout)


def _make_sources(demo: Demo, name: str, claim: str) -> None:
    """Base model and dataset on the workspace, made in the cluster by a Job; nothing to do when that Job is done."""
    options = demo.options
    remove = f"finetune/jobs/{options.namespace}/{name}" if options.fresh else ""
    files = [ROOT / path for path in SOURCE_FILES]
    config, job = manifests.sources(options.namespace, claim, options.trainer_image, files, remove)
    job_name = job["metadata"]["name"]
    place = ("job", job_name, "-n", options.namespace)
    if options.fresh:
        kubectl.run("delete", *place, "--ignore-not-found", "--wait")
    found = kubectl.find(*place)
    if found is not None and _job_end(found) == "Complete":
        demo.say("base model and dataset are on the workspace already")
        return
    if found is not None and _job_end(found):
        kubectl.run("delete", *place, "--wait")
    demo.say("base model and dataset: made on the spot by a Job in the trainer image")
    kubectl.apply(config)
    kubectl.apply(job)
    began = demo.elapsed
    with _watch("job", *place) as queue:
        while True:
            seen = _next(queue)
            if seen is not None and seen.value is None:
                raise DemoProblem(f"the watch of Job {job_name} ended: {seen.error}; run the demo again")
            end = _job_end(seen.value) if seen is not None and seen.value is not None else ""
            if end:
                break
            demo.check_deadline(f"Job {job_name}")
    log = kubectl.run("logs", f"job/{job_name}", "-n", options.namespace, f"--tail={LOG_LINES}")
    if end != "Complete":
        raise DemoProblem(
            f"Job {job_name}, which makes the base model, failed:\n{log}\nlook at `kubectl -n {options.namespace} "
            f"describe job {job_name}`, then run the demo again"
        )
    for line in log.splitlines():
        demo.say(f"  {line}")
    demo.say(f"  in {view.seconds(demo.elapsed - began)}, start of the pod included")


def _job_end(job: Mapping[str, Any]) -> str:
    """Complete or Failed; "" while the batch/v1 Job is under way."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return next((c["type"] for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), "")


def _apply_job(demo: Demo, example: Mapping[str, Any]) -> None:
    try:
        kubectl.run("apply", "-n", demo.options.namespace, "-f", "-", stdin=json.dumps(example))
    except DemoProblem as problem:
        raise DemoProblem(
            f"{problem}\nIf the kind is unknown, install the operator with `make install`. If the job runs with other "
            "settings, start it anew with `make demo DEMO_ARGS=--fresh`"
        ) from problem


def _follow(demo: Demo, name: str) -> dict[str, Any]:
    """Watch the job and its events until it ends, and show them; the job as it was last seen."""
    namespace = demo.options.namespace
    job_place = (TYPE, name, "-n", namespace)
    event_place = (
        "events",
        "-n",
        namespace,
        f"--field-selector=involvedObject.kind=FineTuneJob,involvedObject.name={name}",
    )
    job: dict[str, Any] = {"metadata": {"namespace": namespace, "name": name}}
    event, began = "", demo.elapsed
    with _watch("job", *job_place) as queue, _watch("event", *event_place, queue=queue), _screen(demo) as screen:
        while True:
            seen = _next(queue)
            if seen is not None and seen.value is None:
                raise DemoProblem(
                    f"the watch of {name} ended: {seen.error or 'no reason'}; run the demo again to go on"
                )
            if seen is not None and seen.value is not None and seen.watch == "job":
                for line in view.changes(job.get("status") or {}, seen.value.get("status") or {}):
                    screen.log(line)
                job = seen.value
            elif seen is not None and seen.value is not None:
                event = f"{seen.value.get('reason', '')}: {seen.value.get('message', '')}"
            screen.show(job, event)
            if job["metadata"].get("deletionTimestamp"):
                raise DemoProblem(f"somebody deleted FineTuneJob {name}: run the demo again to start a new one")
            ended = view.outcome(job) if "generation" in job["metadata"] else None
            if ended is not None and ended.succeeded:
                return job
            if ended is not None:
                break
            if not job.get("status") and demo.elapsed - began > FIRST_LOOK_SECONDS:
                raise DemoProblem(
                    f"the operator has not looked at the job for {FIRST_LOOK_SECONDS} s: see `kubectl get pods -A -l "
                    "app.kubernetes.io/name=finetune-operator`, or install it with `make install`"
                )
            demo.check_deadline(f"FineTuneJob {name}")
    raise DemoProblem(
        f"FineTuneJob {name} failed{f' in stage {ended.stage}' if ended.stage else ''}: {ended.reason}: "
        f"{ended.message}{_last_lines(namespace, name, ended.stage)}\nWhen the cause is gone, start it anew with "
        "`make demo DEMO_ARGS=--fresh`"
    )


def _last_lines(namespace: str, name: str, stage: str) -> str:
    """The end of the log of the stage's pod that failed, "" where there is none any more."""
    selector = f"{PREFIX}/job-name={name},{PREFIX}/stage={stage}"
    pods = kubectl.items("pods", "-n", namespace, "-l", selector) if stage else []
    failed = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Failed"] or pods
    if not failed:
        return ""
    pod = max(failed, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))["metadata"]["name"]
    try:
        log = kubectl.run("logs", pod, "-n", namespace, f"--tail={LOG_LINES}")
    except DemoProblem as problem:
        return f"\n(no log of pod {pod}: {problem})"
    return f"\nlast lines of pod {pod}:\n{log.rstrip()}"


def _read_evaluation(demo: Demo, job: Mapping[str, Any], claim: str) -> dict[str, Any]:
    """evaluation.json of the job, read from the workspace by a pod: the status holds as much of it as fits a report."""
    namespace = demo.options.namespace
    artifact = ((job["status"].get("artifacts") or {}).get("evaluation") or {}).get("path")
    if not artifact:
        raise DemoProblem(
            f"the job succeeded without status.artifacts.evaluation: see `kubectl -n {namespace} get ftj -o yaml`"
        )
    pod = manifests.reader(namespace, claim, demo.options.trainer_image, f"{artifact}/evaluation.json")
    place = ("pod", pod["metadata"]["name"], "-n", namespace)
    kubectl.run("delete", *place, "--ignore-not-found", "--wait")
    kubectl.apply(pod)
    try:
        with _watch("pod", *place) as queue:
            phase = ""
            while phase not in ("Succeeded", "Failed"):
                seen = _next(queue)
                if seen is not None:
                    phase = ((seen.value or {}).get("status") or {}).get("phase", "Failed")
                demo.check_deadline("the pod that reads evaluation.json")
        text = kubectl.run("logs", pod["metadata"]["name"], "-n", namespace)
        if phase != "Succeeded":
            raise DemoProblem(f"the pod that reads {artifact}/evaluation.json failed: {text.strip()}")
        evaluation: dict[str, Any] = json.loads(text)
        return evaluation
    finally:
        kubectl.run("delete", *place, "--ignore-not-found", "--wait=false")


def _place_of(demo: Demo, claim: str) -> str:
    """Where the workspace's root lies: a folder of this machine where the cluster is local."""
    folder = os.environ.get("CLUSTER_WORKSPACE")
    if folder and not demo.options.existing_cluster:
        return f"{folder}/{demo.options.namespace}-{claim}"
    return f"claim {claim}:"


@contextmanager
def _watch(
    name: str, *arguments: str, queue: SimpleQueue[kubectl.Seen] | None = None
) -> Iterator[SimpleQueue[kubectl.Seen]]:
    queue = queue or SimpleQueue()
    watch = kubectl.Watch(name, queue, *arguments)
    try:
        yield queue
    finally:
        watch.close()


def _next(queue: SimpleQueue[kubectl.Seen]) -> kubectl.Seen | None:
    """What a watch saw next, None after a second without anything: then only clocks move on."""
    try:
        return queue.get(timeout=1)
    except Empty:
        return None


class _Screen:
    """The live view on a terminal; one line a change, with the time, anywhere else."""

    def __init__(self, demo: Demo, live: Live | None) -> None:
        self._demo = demo
        self._live = live

    def log(self, line: str) -> None:
        if self._live is None:
            self._demo.say(f"[{self._demo.elapsed:4.0f} s] {line}")
            sys.stdout.flush()

    def show(self, job: Mapping[str, Any], event: str) -> None:
        if self._live is not None:
            # The edge of the program: only here the clock of the day is read.
            now = datetime.now(timezone.utc)  # noqa: TID251
            self._live.update(view.render(job, event, self._demo.elapsed, now), refresh=True)


@contextmanager
def _screen(demo: Demo) -> Iterator[_Screen]:
    if not demo.console.is_terminal:
        yield _Screen(demo, None)
        return
    with Live(console=demo.console, auto_refresh=False, vertical_overflow="visible") as live:
        yield _Screen(demo, live)
