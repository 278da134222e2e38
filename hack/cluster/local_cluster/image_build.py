"""Dockerfiles to images, straight into the kubelet's store, with BuildKit.

What a build needs from the host and must never end up in an image is passed as secrets: the CA bundle as id `ca`, and
settings of the package index and proxies each under its own name (PIP_INDEX_URL, ...). A Dockerfile takes them for
one RUN: `--mount=type=secret,id=ca --mount=type=secret,id=PIP_INDEX_URL,env=PIP_INDEX_URL`. One that is not set on
the host is not there in the build either.
"""

import configparser
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import binaries, images, processes
from .problem import ClusterProblem
from .settings import Settings
from .terminal import Progress, say

GIB = 1024**3
_INDEX_VARIABLES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "UV_DEFAULT_INDEX",
    "UV_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
)
# BuildKit keeps build arguments of these names out of the image's history.
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_PIP_CONFIGS = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")  # the later wins
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_REBUILD_GIB = 3  # free disk for a build whose dependencies are cached
_KEEP_CACHE_GIB = 15  # free disk below which the build cache is given up after a build


@dataclass(frozen=True)
class Build:
    """One image to build. `disk_gib`: free disk that a build of it from nothing takes."""

    name: str
    tag: str
    dockerfile: Path
    context: Path
    build_args: tuple[str, ...] = ()
    disk_gib: int = 3
    secrets: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.tag}"


def index_settings(environ: Mapping[str, str], pip_configs: Sequence[str]) -> dict[str, str]:
    """Variables that point pip and uv to the host's package index: its own, else what pip's configuration texts say."""
    found = {}
    for text in pip_configs:
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        parser.read_string(text)
        for key, variable in (("index-url", "PIP_INDEX_URL"), ("extra-index-url", "PIP_EXTRA_INDEX_URL")):
            if parser.has_option("global", key):
                found[variable] = parser.get("global", key)
    return found | {name: environ[name] for name in _INDEX_VARIABLES if environ.get(name)}


def command(
    build: Build, buildctl: Path, socket: Path, ca_bundle: Path | None, environ: Mapping[str, str]
) -> list[str]:
    """buildctl's command line. Pure. Secret values stay in the environment of the call, out of the command line."""
    argv = [str(buildctl), "--addr", f"unix://{socket}", "build", "--progress=plain", "--frontend=dockerfile.v0"]
    argv += ["--local", f"context={build.context}", "--local", f"dockerfile={build.dockerfile.parent}"]
    argv += ["--opt", f"filename={build.dockerfile.name}", "--opt", "image-resolve-mode=local"]
    for argument in build.build_args:
        argv += ["--opt", f"build-arg:{argument}"]
    for name in _PROXY_VARIABLES:
        if environ.get(name):
            argv += ["--opt", f"build-arg:{name}={environ[name]}"]
    if ca_bundle is not None:
        argv += ["--secret", f"id=ca,src={ca_bundle}"]
    for name in build.secrets:
        argv += ["--secret", f"id={name},env={name}"]
    return [*argv, "--output", f"type=image,name={build.reference},compression=uncompressed,unpack=true"]


def find_ca_bundle(environ: Mapping[str, str]) -> Path | None:
    """The certificates that this host trusts, private authorities included."""
    path = Path(environ.get("SSL_CERT_FILE") or _CA_BUNDLE)
    return path if path.is_file() else None


def run(settings: Settings, build: Build) -> bool:
    """Build the image unless its tag is in the store. True if it was built."""
    if processes.find_running(settings, "buildkitd") is None:
        raise ClusterProblem("buildkitd does not run; start the cluster with `cluster.py up`")
    present = images.stored(settings)
    images.note_request(settings, build.reference, time.time())  # noqa: TID251 - a date to sort by, not a decision
    if build.reference in present:
        say(f"  {build.reference} is in the store")
        return False
    _check_disk(settings, build, present)
    configs = [Path(path).expanduser() for path in _PIP_CONFIGS]
    index = index_settings(os.environ, [path.read_text() for path in configs if path.is_file()])
    build = replace(build, secrets=tuple(sorted(index)))
    buildctl = binaries.programs(settings)["buildctl"]
    argv = command(build, buildctl, settings.buildkit_socket, find_ca_bundle(os.environ), os.environ)
    _run_logged(settings, build, argv, {**os.environ, **index})
    prune_cache(settings)
    return True


def _check_disk(settings: Settings, build: Build, present: list[str]) -> None:
    seen = any(reference.startswith(f"{build.name}:") for reference in present)
    needed = _REBUILD_GIB if seen else build.disk_gib
    free = shutil.disk_usage(settings.state).free
    if free < needed * GIB:
        raise ClusterProblem(
            f"building {build.reference} takes {needed} GiB and {settings.state} has {free / GIB:.0f} GiB free: "
            "free some disk, run `cluster.py gc-images`, or point FINETUNE_STATE at a larger disk"
        )


def _run_logged(settings: Settings, build: Build, argv: list[str], env: dict[str, str]) -> None:
    log = settings.logs / f"build-{build.name.rpartition('/')[2]}.log"
    label = build.reference.rpartition("/")[2]
    with Progress(label, done="built") as line, log.open("w") as kept:
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            assert running.stdout is not None
            for text in running.stdout:
                kept.write(text)
                line.note(text.strip()[:80])
        kept.flush()
        if running.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise ClusterProblem(f"building {build.reference} failed; the end of {log}:\n{tail}")


def prune_cache(settings: Settings) -> None:
    """Drop cache mounts always, and the whole build cache when the disk is short.

    What stays are the steps of the last builds, dependencies included, up to the limit in buildkitd's configuration:
    a build in which only our sources changed installs nothing again.
    """
    buildctl = binaries.programs(settings)["buildctl"]
    prune = [str(buildctl), "--addr", f"unix://{settings.buildkit_socket}", "prune"]
    subprocess.run([*prune, "--filter", "type==exec.cachemount"], capture_output=True, check=False)
    if shutil.disk_usage(settings.state).free < _KEEP_CACHE_GIB * GIB:
        say("  the disk is short: the build cache is given up")
        subprocess.run([*prune, "--all"], capture_output=True, check=False)
