"""The commands of `kubectl finetune`: options in, FineTuneClient's calls, screens or JSON out, exit codes for scripts.

Each command is a few lines: what it does is client.py and offline.py, what it shows screens.py. Only here the clock is
read, the terminal is asked for its width, and errors become words on standard error.
"""

from __future__ import annotations

import json
import os
import sys
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console, RenderableType
from rich.live import Live

from finetune_client import screens
from finetune_client.client import FineTuneClient
from finetune_client.errors import ClientError, Exit, SpecError, exit_code_of
from finetune_client.job import Job
from finetune_operator.api.constants import API_VERSION
from finetune_trainer import contract

DAY_SECONDS = 86400


class Output(StrEnum):
    """Forms of what is printed."""

    TEXT = "text"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True)
class _Where:
    """Which cluster and namespace, as the options said."""

    namespace: str | None
    context: str | None
    kubeconfig: str | None

    def client(self) -> FineTuneClient:
        return FineTuneClient(namespace=self.namespace, context=self.context, kubeconfig=self.kubeconfig)


app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 the job failed, 2 usage or spec, 3 cluster not reachable or forbidden, 4 time is over.",
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"finetune-client {metadata.version('finetune-client')}, API {API_VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the release and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """FineTuneJobs from the terminal: submit, follow, understand. As `kubectl finetune` too."""


Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; without it that of the kubeconfig's context.")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; without it the current.")]
Kubeconfig = Annotated[str | None, typer.Option("--kubeconfig", help="Kubeconfig, in place of $KUBECONFIG.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="Manifest of a FineTuneJob; - is standard input.")]
Output_ = Annotated[Output, typer.Option("--output", "-o", help="Form of what is printed.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="The installation's configuration (config.yaml of its ConfigMap).")
]
Image = Annotated[str | None, typer.Option("--trainer-image", help="The trainer's image, in place of --config's.")]


def _complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Names of jobs for the shell; nothing where the cluster cannot be asked."""
    given = context.params
    try:
        where = _Where(given.get("namespace"), given.get("context"), given.get("kubeconfig"))
        return [job.name for job in where.client().list() if job.name.startswith(incomplete)]
    except ClientError:
        return []


def _complete_stage(incomplete: str) -> list[str]:
    return [stage for stage in contract.STAGES if stage.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a FineTuneJob.", autocompletion=_complete_name)]


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code. What went wrong is told on standard error."""
    try:
        result = app(args=arguments, prog_name=_program(arguments), standalone_mode=False)
        return int(result) if isinstance(result, int) else int(Exit.OK)
    except typer.Exit as leave:
        return leave.exit_code
    except typer.TyperException as error:
        show = getattr(error, "show", None)  # usage errors show the command's usage too
        if callable(show):
            show()
        else:
            _tell(str(error))
        return int(Exit.USAGE)
    except SpecError as error:
        _tell(f"the spec is wrong in {len(error.problems)} place{'s' if len(error.problems) > 1 else ''}:")
        for problem in error.problems:
            _tell(f"  {problem}", marked=False)
        return int(Exit.USAGE)
    except ClientError as error:
        _tell(str(error))
        return exit_code_of(error)
    except (KeyboardInterrupt, typer.Abort):
        _tell("stopped looking; nothing in the cluster was changed by that")
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)


def complete(arguments: list[str]) -> int:
    """What kubectl asks for to complete `kubectl finetune`: one suggestion a line, then how to go on (4: no files)."""
    os.environ.update(
        _FINETUNE_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(("finetune", *arguments)),
        COMP_CWORD=str(len(arguments)),
    )
    try:
        app(args=[], prog_name="finetune", standalone_mode=False)
    except (typer.Exit, SystemExit):
        print(":4")
    return int(Exit.OK)


def _program(arguments: list[str]) -> str:
    """The program as its user calls it; for completion by the name that the shell knows."""
    name = Path(sys.argv[0]).name
    completing = any(each.startswith("_") and each.endswith("_COMPLETE") for each in os.environ)
    if completing or {"--show-completion", "--install-completion"} & set(arguments):
        return name if name.endswith("finetune") else "finetune"
    return "kubectl finetune" if name.startswith("kubectl-") else "finetune"


# ---- make and look


@app.command()
def submit(
    file: File,
    name: Annotated[str | None, typer.Option("--name", help="Name of the job, in place of the file's.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the job is finished, and show how it goes.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="With --wait: at most so many seconds.")] = DAY_SECONDS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the API server check it; make nothing.")] = False,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Check a manifest and make its FineTuneJob."""
    client = _Where(namespace, context, kubeconfig).client()
    job = client.submit(file, name=name, dry_run=dry_run)
    if wait and not dry_run:
        return _watch(_in(client, job, context, kubeconfig), job.name, timeout)
    end = "passes every check of the API server; nothing was made" if dry_run else "submitted"
    _print(output, job, lambda: f"{job.namespace}/{job.name} {end}")
    if output is Output.TEXT and not dry_run:
        print(f"follow it with: finetune watch {job.name} -n {job.namespace}")
    return Exit.OK


@app.command(name="list")
def list_(
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Show all jobs, a line each."""
    client = _Where(namespace, context, kubeconfig).client()
    jobs = client.list(all_namespaces=all_namespaces)
    if output in (Output.JSON, Output.YAML):
        _dump(output, {"apiVersion": "v1", "kind": "List", "items": [job.raw for job in jobs]})
    elif output is Output.NAME:
        for job in jobs:
            print(_resource(job))
    elif not jobs:
        where = "in any namespace" if all_namespaces else f"in namespace {client.namespace}"
        print(f"there are no FineTuneJobs {where}", file=sys.stderr)
    else:
        _show(screens.list_table(jobs, _now(), namespaces=all_namespaces, wide=output is Output.WIDE))
    return Exit.OK


@app.command()
def status(
    name: Name,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Show one job on one screen. Exit code 1 when it has failed."""
    job = _Where(namespace, context, kubeconfig).client().get(name)
    _print(output, job, lambda: screens.status_screen(job, _now()))
    return Exit.JOB_FAILED if job.failed else Exit.OK


@app.command()
def watch(
    name: Name,
    timeout: Annotated[float, typer.Option("--timeout", help="At most so many seconds.")] = DAY_SECONDS,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Follow one job until it is finished.

    A live screen, or a line a change where the output is no terminal.
    """
    return _watch(_Where(namespace, context, kubeconfig).client(), name, timeout)


@app.command()
def wait(
    name: Name,
    timeout: Annotated[float, typer.Option("--timeout", help="At most so many seconds.")] = DAY_SECONDS,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Wait in silence until a job is finished.

    Exit code 0 when it succeeded, 1 when it failed, 4 when the time is over.
    """
    job = _Where(namespace, context, kubeconfig).client().wait(name, timeout=timeout)
    print(f"{job.namespace}/{job.name} {job.phase}")
    return Exit.OK


@app.command()
def logs(
    name: Name,
    stage: Annotated[
        str | None,
        typer.Option("--stage", "-s", help="The stage; without it the current one.", autocompletion=_complete_stage),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the stage or the job ends.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Only the last lines of each pod.")] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Print the log of a stage's newest attempt."""
    client = _Where(namespace, context, kubeconfig).client()
    said = False
    for line in client.logs(name, stage=stage, follow=follow, tail=tail):
        said = True
        print(line, flush=follow)
    if not said:
        print(f"{name}: no log of {stage or 'any stage'} is there yet", file=sys.stderr)
    return Exit.OK


@app.command()
def why(
    name: Name,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Say why a job stands where it does.

    Reason, cause, what shows it, and what to do. Exit code 1 when it has failed.
    """
    from finetune_client.doctor import diagnose

    job = _Where(namespace, context, kubeconfig).client().get(name)
    if output in (Output.JSON, Output.YAML):
        found = diagnose(job)
        told = {
            "job": job.name,
            "namespace": job.namespace,
            "standing": str(found.standing),
            "stage": None if found.stage is None else found.stage.name,
            "reason": found.reason,
            "message": found.message,
            "causes": [{"reason": each.reason, "cause": each.cause, "cure": each.cure} for each in found.entries],
            "attempt": None if found.attempt is None else found.attempt.as_json(),
            "log": list(found.log),
            "follows": found.follows,
            "toDo": [each for each in (*found.cures, found.command) if each],
        }
        _dump(output, told)
    else:
        _print(output, job, lambda: screens.why_screen(job, _now()))
    return Exit.JOB_FAILED if job.failed else Exit.OK


# ---- change


@app.command()
def suspend(
    name: Name,
    wait_seconds: Annotated[
        float | None, typer.Option("--wait", help="Stay until no pod is left, at most so many seconds.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Hold a job, after a checkpoint.

    What runs gets time to write one and stops.
    """
    job = _Where(namespace, context, kubeconfig).client().suspend(name, wait=wait_seconds)
    print(f"{job.namespace}/{job.name} {'is suspended' if wait_seconds is not None else 'is being suspended'}")
    return Exit.OK


@app.command()
def resume(name: Name, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> int:
    """Let a held job go on."""
    job = _Where(namespace, context, kubeconfig).client().resume(name)
    print(f"{job.namespace}/{job.name} goes on")
    return Exit.OK


@app.command()
def retry(
    name: Name,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="Only if this is the stage that failed.", metavar="STAGE")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="At most so many seconds for the operator.")] = 300,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Try a failed job again.

    It goes on with the stage that failed; what is complete is not run again.
    """
    job = _Where(namespace, context, kubeconfig).client().retry(name, from_stage=from_stage, timeout=timeout)
    print(f"{job.namespace}/{job.name} tries again")
    return Exit.OK


@app.command()
def delete(
    name: Name,
    wait_seconds: Annotated[
        float | None, typer.Option("--wait", help="Stay until it is gone, at most so many seconds.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Delete a job; its artifacts stay.

    What it made in the cluster goes with it, what lies on the workspace stays.
    """
    client = _Where(namespace, context, kubeconfig).client()
    client.delete(name, wait=wait_seconds)
    print(f"{client.namespace}/{name} {'is deleted' if wait_seconds is not None else 'is being deleted'}")
    return Exit.OK


# ---- results and plans


@app.command()
def report(
    name: Name,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", help="Folder at which the workspace's volume is mounted here.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open report.html where there is one.")] = True,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Show a job's results.

    Where they lie, and how the tuned model compares; opens report.html where it can be read here.
    """
    found = _Where(namespace, context, kubeconfig).client().report(name, workspace=workspace)
    if output in (Output.JSON, Output.YAML):
        _dump(output, found.as_json())
    elif output is Output.NAME:
        for artifact in found.artifacts.values():
            print(artifact.path)
    else:
        _show(screens.report_screen(found))
        if found.page is not None and open_ and sys.stdout.isatty():
            webbrowser.open(found.page.resolve().as_uri())
    return Exit.OK


@app.command()
def plan(
    file: File,
    offline: Annotated[bool, typer.Option("--offline", help="By arithmetic only; no cluster is asked.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="At most so many seconds for the operator.")] = 60,
    config: Config = None,
    trainer_image: Image = None,
    output: Output_ = Output.TEXT,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Show what a job would take.

    Stages, Jobs, memory, time and cost: by a dry run in the cluster, deleted again, or with --offline by the operator's
    arithmetic on this machine. Exit code 1 when it would be refused.
    """
    from finetune_client.manifests import read_manifest

    name, note, refused = str(read_manifest(file)["metadata"]["name"]), "", False
    if offline:
        from finetune_client.offline import NO_SETTINGS, plan_offline, read_settings

        found = plan_offline(file, read_settings(config, image=trainer_image), _now())
        note = NO_SETTINGS if config is None else ""
        refused = "It would be refused (" in found.message
    else:
        job = _Where(namespace, context, kubeconfig).client().plan(file, timeout=timeout)
        assert job.status.plan is not None
        found = job.status.plan
        refused = any(each.type == "Validated" and each.status == "False" for each in job.status.conditions)
    if output in (Output.JSON, Output.YAML):
        _dump(output, found.as_json())
    elif output is Output.NAME:
        for stage in found.stages:
            print(stage.name)
    else:
        _show(screens.plan_screen(name, found, note=note))
    return Exit.JOB_FAILED if refused else Exit.OK


@app.command()
def render(
    file: File,
    stage: Annotated[str | None, typer.Option("--stage", "-s", help="Only this stage.")] = None,
    stage_json: Annotated[
        bool, typer.Option("--stage-json", help="What the stages' programs read, in place of the Jobs.")
    ] = False,
    config: Config = None,
    trainer_image: Image = None,
    output: Output_ = Output.YAML,
    namespace: Namespace = None,
) -> int:
    """Print what the operator would make.

    Jobs and Services of a manifest, by the operator's own functions; no cluster is asked.
    """
    from finetune_client.offline import as_yaml, read_settings
    from finetune_client.offline import render as render_offline

    made = list(render_offline(file, read_settings(config, image=trainer_image), _now(), namespace=namespace))
    shown = [each for each in made if stage in (None, each.stage)]
    if not shown:
        raise ClientError(f"--stage: the job does not run {stage!r}; it runs {', '.join(each.stage for each in made)}")
    if output is Output.NAME:
        for each in shown:
            print("\n".join(f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in each.manifests))
    elif stage_json:
        _dump(output, {each.stage: dict(each.stage_json) for each in shown})
    elif output is Output.JSON:
        items = [manifest for each in shown for manifest in each.manifests]
        _dump(output, {"apiVersion": "v1", "kind": "List", "items": items})
    else:
        for each in shown:
            print(as_yaml(each), end="")
    return Exit.OK


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def preview(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Manifest of a FineTuneJob.", exists=True, dir_okay=False)
    ],
) -> int:
    """Show samples of a job's data.

    What is learnt is marked, before anything is paid for.

    Reads tokenizer and dataset on this machine, as the prepare stage will. Further options (--workspace, --token-file,
    --records, --samples) are those of `finetune-trainer preview`.
    """
    from finetune_client.offline import preview as show

    return show(file, context.args)


# ---- underneath


def _in(client: FineTuneClient, job: Job, context: str | None, kubeconfig: str | None) -> FineTuneClient:
    """The client for the job's own namespace, which its manifest may have named."""
    if job.namespace == client.namespace:
        return client
    return FineTuneClient(namespace=job.namespace, context=context, kubeconfig=kubeconfig)


def _watch(client: FineTuneClient, name: str, timeout: float) -> int:
    console = _console()
    last: Job | None = None
    if console.is_terminal:

        def screen() -> RenderableType:
            return "" if last is None else screens.status_screen(last, _now())

        with Live(console=console, get_renderable=screen, refresh_per_second=1) as live:
            for job in client.watch(name, timeout=timeout):
                last = job
                live.refresh()
    else:
        said = ""
        for last in client.watch(name, timeout=timeout):
            line = _line(last)
            if line != said:
                print(f"{_now():%H:%M:%S} {line}", flush=True)
            said = line
    if last is None or not last.is_finished:
        _tell(f"{name} is not finished after {timeout:g} seconds; it goes on")
        return Exit.TIMEOUT
    if last.failed:
        if not console.is_terminal:
            _tell(f"{name} failed: {last.status.reason}: {last.status.message}")
        return Exit.JOB_FAILED
    return Exit.OK


def _line(job: Job) -> str:
    state = job.status
    parts = [job.phase, state.stage, state.progress, f"{state.eta} left" if state.eta else "", state.reason]
    return "  ".join(part for part in parts if part)


def _print(output: Output, job: Job, text: Callable[[], RenderableType]) -> None:
    if output in (Output.JSON, Output.YAML):
        _dump(output, job.raw)
    elif output is Output.NAME:
        print(_resource(job))
    else:
        _show(text())


def _dump(output: Output, value: Mapping[str, Any]) -> None:
    if output is Output.JSON:
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        print(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=120), end="")


def _show(what: RenderableType) -> None:
    """To the terminal as it is; to a file or pipe without the spaces that fill lines up."""
    console = _console()
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _console() -> Console:
    """Standard output as it is. Where it is no terminal: 80 columns, or those that COLUMNS says."""
    return Console(highlight=False, markup=False, emoji=False)


def _resource(job: Job) -> str:
    return f"finetunejob.finetune-operator.io/{job.name}"


def _tell(text: str, *, marked: bool = True) -> None:
    print(f"finetune: {text}" if marked else text, file=sys.stderr)


def _now() -> datetime:
    return datetime.now(timezone.utc)  # noqa: TID251  the one place of the client that reads the clock
