"""The commands of cluster.py: arguments in, one function of the package called, problems printed as sentences."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import binaries, digests, image_build, images, kueue, kwok, lifecycle, status, workspace
from .problem import ClusterProblem
from .settings import IMAGE_NAMESPACE, Settings, current_settings
from .terminal import say

Command = Callable[[Settings, argparse.Namespace], int]


def _up(settings: Settings, options: argparse.Namespace) -> int:
    started = time.monotonic()
    lifecycle.up(settings, options.image_gib)
    say(f"cluster: up in {time.monotonic() - started:.1f} s; KUBECONFIG={settings.kubeconfig}")
    return 0


def _down(settings: Settings, options: argparse.Namespace) -> int:
    lifecycle.down(settings, options.purge)
    say("cluster: down, nothing is left running")
    return 0


def _status(settings: Settings, _: argparse.Namespace) -> int:
    text, healthy = status.report(settings)
    print(text)
    return 0 if healthy else 1


def _build(settings: Settings, _: argparse.Namespace) -> int:
    lifecycle.check_machine(settings, 0)
    lifecycle.build(settings)
    return 0


def environment(settings: Settings, path: str) -> dict[str, str]:
    """Variables with which kubectl, helm, ctr and buildctl find the cluster, its tools put before `path`."""
    programs = binaries.programs(settings)
    folders = dict.fromkeys(str(programs[name].parent) for name in ("kubectl", "helm", "buildctl"))
    return {
        "KUBECONFIG": str(settings.kubeconfig),
        "PATH": os.pathsep.join([*folders, path]),
        "BUILDKIT_HOST": f"unix://{settings.buildkit_socket}",
        "CONTAINERD_ADDRESS": str(settings.containerd_socket),
        "CONTAINERD_NAMESPACE": IMAGE_NAMESPACE,
        "CLUSTER_KUBECTL": str(programs["kubectl"]),
        "CLUSTER_HELM": str(programs["helm"]),
        "CLUSTER_WORKSPACE": str(settings.workspace),
        "CLUSTER_LOGS": str(settings.logs),
        "FINETUNE_AUDIT_LOG": str(settings.audit_log),
        "FINETUNE_OPERATOR_KUBECONFIG": str(settings.operator_kubeconfig),
    }


def _env(settings: Settings, options: argparse.Namespace) -> int:
    values = environment(settings, os.environ["PATH"])
    if options.name:
        print(values[options.name])
        return 0
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _base_image(_: Settings, __: argparse.Namespace) -> int:
    print(images.base_reference())
    return 0


def _content_tag(_: Settings, options: argparse.Namespace) -> int:
    print(digests.content_tag(options.paths, options.salt))
    return 0


def _build_image(settings: Settings, options: argparse.Namespace) -> int:
    build = image_build.Build(
        name=options.name,
        tag=options.tag,
        dockerfile=options.file.resolve(),
        context=options.context.resolve(),
        build_args=tuple(options.build_arg),
        disk_gib=options.disk_gib,
    )
    image_build.run(settings, build)
    print(build.reference)
    return 0


def _image_import(settings: Settings, options: argparse.Namespace) -> int:
    images.import_archive(settings, options.archive.resolve())
    return 0


def _gc_images(settings: Settings, options: argparse.Namespace) -> int:
    for reference in images.collect(settings, options.keep):
        say(f"  deleted {reference}")
    image_build.prune_cache(settings)
    return 0


def _workspace_pvc(settings: Settings, options: argparse.Namespace) -> int:
    print(workspace.prepare_claim(settings, options.namespace, options.name))
    return 0


def _kueue_up(settings: Settings, _: argparse.Namespace) -> int:
    lifecycle.start_add_on(settings, kueue.NAME, kueue.start)
    say("kueue: up; Jobs with the label kueue.x-k8s.io/queue-name wait for its admission")
    return 0


def _kueue_down(settings: Settings, _: argparse.Namespace) -> int:
    lifecycle.stop_add_on(settings, kueue.NAME, kueue.stop)
    say("kueue: down, its kinds and webhooks are gone")
    return 0


def _kwok_up(settings: Settings, options: argparse.Namespace) -> int:
    stages = [file.resolve() for file in options.stages]
    lifecycle.start_add_on(settings, kwok.NAME, lambda settings: kwok.start(settings, stages, options.nodes))
    say(f"kwok: up; it plays the nodes with the annotation {kwok.FAKE}=fake")
    return 0


def _kwok_down(settings: Settings, _: argparse.Namespace) -> int:
    lifecycle.stop_add_on(settings, kwok.NAME, kwok.stop)
    say("kwok: down, its nodes are gone")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.py", description="A real single-node Kubernetes on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    up = add("up", _up, "start the cluster, or the parts of it that died; builds what is missing first")
    up.add_argument("--image-gib", type=int, default=0, help="free disk in GiB to require for images still to be built")
    down = add("down", _down, "end the cluster and remove all that it made but caches, images and workspace")
    down.add_argument("--purge", action="store_true", help="delete images, workspace and logs as well")
    add("status", _status, "parts, node, images and disk; exit code 1 unless every part is ready")
    add("build", _build, "install packages, build binaries and base image; start nothing")
    env = add("env", _env, "print `export` lines for a shell, or the value of one variable")
    env.add_argument("name", nargs="?", help="only this variable, without `export`")
    add("base-image", _base_image, "print the base image's name, for a Dockerfile's BASE_IMAGE argument")
    tag = add("content-tag", _content_tag, "print a tag made from the contents of files and folders")
    tag.add_argument("paths", nargs="+", type=Path)
    tag.add_argument("--salt", default="", help="text that counts as content too, such as a base image's name")
    build = add("build-image", _build_image, "build a Dockerfile into the node's image store, unless the tag is there")
    build.add_argument("--name", required=True, help="such as localhost/finetune-trainer")
    build.add_argument("--tag", required=True)
    build.add_argument("--file", required=True, type=Path, help="the Dockerfile")
    build.add_argument("--context", type=Path, default=Path())
    build.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    build.add_argument("--disk-gib", type=int, default=3, help="free disk in GiB that a build from nothing takes")
    load = add("image-import", _image_import, "import an image archive (docker save or OCI layout)")
    load.add_argument("archive", type=Path)
    collect = add("gc-images", _gc_images, "delete images of earlier content that nothing uses, and cache mounts")
    collect.add_argument("--keep", type=int, default=1, help="tags to keep of each image, the last asked for")
    claim = add("workspace-pvc", _workspace_pvc, "make a workspace folder; print its volume and claim to apply")
    claim.add_argument("--namespace", required=True)
    claim.add_argument("--name", required=True)
    _add_on_commands(commands)
    return parser


def _add_on_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`kueue up`, `kueue down`, `kwok up`, `kwok down`."""

    def actions(name: str, text: str, up: Command, down: Command) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        below = command.add_subparsers(dest="action", required=True, metavar="ACTION")
        start = below.add_parser("up", help="build it if it never was, start it, wait until it is ready")
        start.set_defaults(run=up)
        below.add_parser("down", help="end it and remove all of it from the cluster").set_defaults(run=down)
        return start

    actions("kueue", "Kueue, the queue of Jobs, with its webhooks", _kueue_up, _kueue_down)
    start = actions("kwok", "KWOK, which plays nodes that do not exist, and their pods", _kwok_up, _kwok_down)
    text = "files with KWOK's Stage objects, all that shall apply; without any, KWOK's own"
    start.add_argument("--stages", nargs="+", action="extend", default=[], type=Path, metavar="FILE", help=text)
    start.add_argument("--nodes", type=int, default=0, help="how many plain fake nodes to make")


def main(arguments: list[str]) -> int:
    """Run one command; its exit code. 1 is a problem that was printed."""
    options = _parser().parse_args(arguments)
    # A login shell of root may lack the folders that ip, nft and runc are in.
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    run: Command = options.run
    try:
        return run(current_settings(), options)
    except ClusterProblem as problem:
        print(f"cluster: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cluster: interrupted; run the command again to go on, or `down` to clean up", file=sys.stderr)
        return 130
