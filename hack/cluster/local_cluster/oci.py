"""Image archives from a root file system: how the base and the pause image come into being without a registry.

Writes the OCI image layout as one tar file, which `ctr images import` reads. Knows nothing about containerd.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

_MEDIA = "application/vnd.oci.image"


@dataclass(frozen=True)
class ImageConfig:
    """What a container of the image starts as, unless its pod says otherwise."""

    entrypoint: tuple[str, ...] = ()
    env: tuple[str, ...] = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
    user: str = ""


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _add_blob(archive: tarfile.TarFile, content: bytes, kind: str) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    _add(archive, f"blobs/sha256/{digest}", content)
    return {"mediaType": f"{_MEDIA}.{kind}", "digest": f"sha256:{digest}", "size": len(content)}


def write_archive(target: Path, layer: Path, reference: str, architecture: str, config: ImageConfig) -> None:
    """Write an image of one uncompressed layer, the tar file `layer`, under the name `reference`. Atomic."""
    with layer.open("rb") as file:
        layer_digest = hashlib.file_digest(file, "sha256").hexdigest()
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": list(config.entrypoint), "Env": list(config.env), "User": config.user},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
    }
    unfinished = target.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        archive.add(layer, f"blobs/sha256/{layer_digest}", filter=_anonymous)
        layer_reference = {
            "mediaType": f"{_MEDIA}.layer.v1.tar",
            "digest": f"sha256:{layer_digest}",
            "size": layer.stat().st_size,
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}.manifest.v1+json",
            "config": _add_blob(archive, json.dumps(document).encode(), "config.v1+json"),
            "layers": [layer_reference],
        }
        described = _add_blob(archive, json.dumps(manifest).encode(), "manifest.v1+json")
        described["annotations"] = {"io.containerd.image.name": reference}
        described["platform"] = {"architecture": architecture, "os": "linux"}
        index = {"schemaVersion": 2, "manifests": [described]}
        _add(archive, "index.json", json.dumps(index).encode())
    unfinished.replace(target)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def write_single_file_layer(target: Path, program: Path) -> None:
    """A layer that holds one executable at the root, and nothing else."""
    with tarfile.open(target, "w") as archive:
        member = tarfile.TarInfo(program.name)
        content = program.read_bytes()
        member.size, member.mode = len(content), 0o755
        archive.addfile(member, io.BytesIO(content))
