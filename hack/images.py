#!/usr/bin/env python3
"""Names and builds the images. Called by the Makefile.

A tag is the digest of everything that goes into the image, so a tag never moves, an unchanged tree never rebuilds, and
the image reference can be part of a stage's digest. `build` makes wheels with the pinned hatchling of .venv and hands
them to BuildKit, which writes straight into the local cluster's image store. With `--cluster existing` nothing is
built: the images are expected in the registry that --prefix names, under the same tags (or IMAGE_TAG).

`operator` and `trainer` are what every installation needs. `neuron` is the trainer for Trainium nodes, over a vendor's
base image, and is built only where it is named; `base` prints that base, or what NEURON_BASE_IMAGE names in its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLUSTER_PY = ["python3", "hack/cluster/cluster.py"]
WHEELS = ROOT / "build" / "wheels"

_SHARED = [".dockerignore", "requirements/bootstrap.txt"]
INPUTS = {
    "trainer": [
        *_SHARED,
        "images/trainer/Dockerfile",
        "images/trainer/remove_cuda.sh",
        "requirements/trainer.txt",
        "trainer",
    ],
    "operator": [*_SHARED, "images/operator", "requirements/operator.txt", "operator", "trainer"],
    "neuron": [
        *_SHARED,
        "images/trainer/neuron.Dockerfile",
        "images/trainer/vendor_packages.py",
        "requirements/neuron.txt",
        "trainer",
    ],
}
"""Everything that an image is made of, by path from the repository's root."""
DEFAULT = ("trainer", "operator")
"""The images that are meant where none is named."""
DOCKERFILES = {
    "trainer": "images/trainer/Dockerfile",
    "operator": "images/operator/Dockerfile",
    "neuron": "images/trainer/neuron.Dockerfile",
}
DISTRIBUTIONS = {"trainer": ["trainer"], "operator": ["trainer", "operator"], "neuron": ["trainer"]}
LOCAL_BUILD_ARGS = {"trainer": ["CUDA=remove"], "operator": [], "neuron": []}
"""The local cluster has no GPU: without the CUDA libraries the image is a third smaller and sooner there."""
NEURON_FAMILY = "trn1"
"""Family of instance types whose base image is built on where NEURON_BASE_IMAGE names none."""

DISK_GIB = {"trainer": 16, "operator": 2, "neuron": 40}
"""Free disk that a build from nothing takes, build cache and node's store together; measured: 14 and 1. neuron is a
guess: its base has torch with its CUDA libraries and much else, and would be there twice."""


def run(command: list[str], **kwargs: object) -> str:
    """Standard output of `command`, run at the repository's root; its stderr is the user's."""
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, **kwargs).stdout.strip()  # type: ignore[call-overload,no-any-return]


def base_image(image: str, cluster: str) -> str:
    """What `image` is built on: the vendor's for neuron, the local cluster's own, "" for the Dockerfile's default."""
    if image == "neuron":
        named = os.environ.get("NEURON_BASE_IMAGE")
        if named:
            return named
        from finetune_trainer import neuron_stack

        return neuron_stack.base_image(NEURON_FAMILY)
    return run([*CLUSTER_PY, "base-image"]) if cluster == "local" else ""


def tag(image: str, cluster: str) -> str:
    """The content tag of `image`; it covers the base image too where we choose that."""
    if cluster == "existing" and os.environ.get("IMAGE_TAG"):
        return os.environ["IMAGE_TAG"]
    parts = [base_image(image, cluster)]
    if cluster == "local":
        parts += LOCAL_BUILD_ARGS[image]
    return run([*CLUSTER_PY, "content-tag", *INPUTS[image], "--salt", " ".join(parts)])


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


def build(images: Sequence[str], cluster: str, prefix: str) -> None:
    """Build what is missing in the local cluster; with an existing one only say what it must be able to pull."""
    for image in images:
        name, base = reference(image, cluster, prefix), base_image(image, cluster)
        if cluster == "existing":
            print(f"images: the cluster must be able to pull {name}")
            if image not in DEFAULT:
                print(f"  docker build -f {DOCKERFILES[image]} --build-arg BASE_IMAGE={base} -t {name} .")
                print(f"  docker push {name}")
            continue
        build_wheels(image)
        subprocess.run(
            [
                *CLUSTER_PY,
                "build-image",
                "--name",
                f"{prefix}/finetune-{image}",
                "--tag",
                name.rsplit(":", 1)[1],
                "--file",
                DOCKERFILES[image],
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
    for command, does in (
        ("build", "build what is missing"),
        ("wheels", "make the wheels that the Dockerfiles copy, for a build with other tools"),
        ("helm-args", "print the --set arguments for the chart"),
    ):
        with_images = commands.add_parser(command, help=does)
        with_images.add_argument("images", nargs="*", help=f"of {', '.join(sorted(INPUTS))}; none: {' '.join(DEFAULT)}")
    print_parser = commands.add_parser("print", help="print one image reference")
    print_parser.add_argument("image", choices=sorted(INPUTS))
    commands.add_parser("base", help="print the base image of neuron")
    commands.add_parser("env", help="print TRAINER_IMAGE= and OPERATOR_IMAGE= lines")
    args = parser.parse_args(argv)
    images = getattr(args, "images", None) or DEFAULT
    unknown = [image for image in images if image not in INPUTS]
    if unknown:
        parser.error(f"no image is called {', '.join(unknown)}: there are {', '.join(sorted(INPUTS))}")
    if args.command == "build":
        build(images, args.cluster, args.prefix)
    elif args.command == "wheels":
        for image in images:
            build_wheels(image)
    elif args.command == "print":
        print(reference(args.image, args.cluster, args.prefix))
    elif args.command == "base":
        print(base_image("neuron", args.cluster))
    elif args.command == "env":
        for image in DEFAULT:
            print(f"{image.upper()}_IMAGE={reference(image, args.cluster, args.prefix)}")
    else:
        pull_policy = "Never" if args.cluster == "local" else "IfNotPresent"
        for image in images:
            repository, image_tag = reference(image, args.cluster, args.prefix).rsplit(":", 1)
            print(f"--set-string images.{image}.repository={repository} --set-string images.{image}.tag={image_tag}")
            if image in DEFAULT:
                print(f"--set-string images.{image}.pullPolicy={pull_policy}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"images: {' '.join(map(str, error.cmd[:6]))} … failed with exit code {error.returncode}")
