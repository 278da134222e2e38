#!/usr/bin/env python3
"""Names and builds the two images. Called by the Makefile.

A tag is the digest of everything that goes into the image, so a tag never moves, an unchanged tree never rebuilds, and
the image reference can be part of a stage's digest. `build` makes wheels with the pinned hatchling of .venv and hands
them to BuildKit, which writes straight into the local cluster's image store. With `--cluster existing` nothing is
built: the images are expected in the registry that --prefix names, under the same tags (or IMAGE_TAG).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLUSTER_PY = ["python3", "hack/cluster/cluster.py"]
WHEELS = ROOT / "build" / "wheels"

_SHARED = [".dockerignore", "requirements/bootstrap.txt"]
INPUTS = {
    "trainer": [*_SHARED, "images/trainer", "requirements/trainer.txt", "trainer"],
    "operator": [*_SHARED, "images/operator", "requirements/operator.txt", "operator", "trainer"],
}
"""Everything that an image is made of, by path from the repository's root."""
DISTRIBUTIONS = {"trainer": ["trainer"], "operator": ["trainer", "operator"]}
LOCAL_BUILD_ARGS = {"trainer": ["CUDA=remove"], "operator": []}
"""The local cluster has no GPU: without the CUDA libraries the image is a third smaller and sooner there."""

DISK_GIB = {"trainer": 16, "operator": 2}
"""Free disk that a build from nothing takes, build cache and node's store together; measured: 14 and 1."""


def run(command: list[str], **kwargs: object) -> str:
    """Standard output of `command`, run at the repository's root; its stderr is the user's."""
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, **kwargs).stdout.strip()  # type: ignore[call-overload,no-any-return]


def tag(image: str, cluster: str) -> str:
    """The content tag of `image`; on the local cluster it covers the base image too."""
    if cluster == "existing" and os.environ.get("IMAGE_TAG"):
        return os.environ["IMAGE_TAG"]
    salt = ""
    if cluster == "local":
        salt = " ".join([run([*CLUSTER_PY, "base-image"]), *LOCAL_BUILD_ARGS[image]])
    return run([*CLUSTER_PY, "content-tag", *INPUTS[image], "--salt", salt])


def reference(image: str, cluster: str, prefix: str) -> str:
    return f"{prefix}/finetune-{image}:{tag(image, cluster)}"


def build_wheels(image: str) -> None:
    """Reproducible wheels of our own distributions for `image`, alone in build/wheels/<image>."""
    folder = WHEELS / image
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "946684800"}
    for distribution in DISTRIBUTIONS[image]:
        run(
            [
                str(ROOT / ".venv/bin/uv"),
                "build",
                "--quiet",
                "--wheel",
                "--no-build-isolation",
                "--python",
                str(ROOT / ".venv/bin/python"),
                "--out-dir",
                str(folder),
                distribution,
            ],
            env=environment,
        )
        (folder / ".gitignore").unlink(missing_ok=True)


def build(cluster: str, prefix: str) -> None:
    """Build what is missing in the local cluster; with an existing one only say what it must be able to pull."""
    for image in INPUTS:
        name = reference(image, cluster, prefix)
        if cluster == "existing":
            print(f"images: the cluster must be able to pull {name}")
            continue
        build_wheels(image)
        base = run([*CLUSTER_PY, "base-image"])
        subprocess.run(
            [
                *CLUSTER_PY,
                "build-image",
                "--name",
                f"{prefix}/finetune-{image}",
                "--tag",
                name.rsplit(":", 1)[1],
                "--file",
                f"images/{image}/Dockerfile",
                "--context",
                ".",
                "--build-arg",
                f"BASE_IMAGE={base}",
                "--disk-gib",
                str(DISK_GIB[image]),
                *(part for argument in LOCAL_BUILD_ARGS[image] for part in ("--build-arg", argument)),
            ],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,  # the reference alone; what it does goes to stderr
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", choices=["local", "existing"], default="local")
    parser.add_argument("--prefix", default="localhost")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build what is missing")
    commands.add_parser("wheels", help="make the wheels that the Dockerfiles copy, for a build with other tools")
    print_parser = commands.add_parser("print", help="print one image reference")
    print_parser.add_argument("image", choices=sorted(INPUTS))
    commands.add_parser("env", help="print TRAINER_IMAGE= and OPERATOR_IMAGE= lines")
    commands.add_parser("helm-args", help="print the --set arguments for the chart")
    args = parser.parse_args(argv)
    if args.command == "build":
        build(args.cluster, args.prefix)
    elif args.command == "wheels":
        for image in INPUTS:
            build_wheels(image)
    elif args.command == "print":
        print(reference(args.image, args.cluster, args.prefix))
    elif args.command == "env":
        for image in INPUTS:
            print(f"{image.upper()}_IMAGE={reference(image, args.cluster, args.prefix)}")
    else:
        pull_policy = "Never" if args.cluster == "local" else "IfNotPresent"
        for image in INPUTS:
            repository, image_tag = reference(image, args.cluster, args.prefix).rsplit(":", 1)
            print(
                f"--set-string images.{image}.repository={repository} --set-string images.{image}.tag={image_tag} "
                f"--set-string images.{image}.pullPolicy={pull_policy}"
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"images: {' '.join(map(str, error.cmd[:6]))} … failed with exit code {error.returncode}")
