"""The base and pause images, and what lies in the kubelet's image store: made, imported, listed, collected.

Images are named by the content that they are made from, so a name that is in the store is right. Building one from
a Dockerfile is image_build.py's.
"""

import hashlib
import json
import subprocess
from pathlib import Path

from . import binaries, oci
from .problem import ClusterProblem
from .settings import IMAGE_NAMESPACE, POD_UID, Settings, architecture
from .terminal import Progress

DEBIAN = "bookworm"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")
# Documentation and translations that no container reads.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_BASE_USER = f"nonroot:x:{POD_UID}:{POD_UID}::/home/nonroot:/usr/sbin/nologin"
_BASE_GROUP = f"nonroot:x:{POD_UID}:"


def base_recipe() -> list[str]:
    """The arguments of mmdebstrap, but for the target."""
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    hooks = [
        # A uid without an entry in passwd has no name and no home, which Python's getpass and torch trip over.
        f"--customize-hook=echo '{_BASE_USER}' >> \"$1/etc/passwd\"",
        f"--customize-hook=echo '{_BASE_GROUP}' >> \"$1/etc/group\"",
        f'--customize-hook=install -d -o {POD_UID} -g {POD_UID} "$1/home/nonroot"',
        '--customize-hook=rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*',
    ]
    return ["--variant=minbase", "--mode=root", f"--include={','.join(BASE_PACKAGES)}", *options, *hooks, DEBIAN]


def base_reference() -> str:
    """The base image's full name, known before it is made."""
    recipe = json.dumps([base_recipe(), architecture()])
    return f"localhost/finetune-base:{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def pause_reference(program: Path) -> str:
    return f"localhost/finetune-pause:{hashlib.sha256(program.read_bytes()).hexdigest()[:16]}"


def base_archive(settings: Settings) -> Path:
    return settings.cache / "images" / f"base-{base_reference().rpartition(':')[2]}.tar"


def make_base(settings: Settings) -> None:
    """Make the base image's archive in the cache unless it is there. Needs root and the Debian mirror."""
    archive = base_archive(settings)
    if archive.exists():
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    layer = archive.with_suffix(".layer")
    with Progress("base image", done="made") as line:
        argv = ["mmdebstrap", *base_recipe()]
        argv.insert(-1, "--format=tar")
        with subprocess.Popen([*argv, str(layer)], stderr=subprocess.PIPE, text=True) as made:
            assert made.stderr is not None
            last: list[str] = []
            for text in made.stderr:
                last = [*last[-14:], text.rstrip()]
                line.note(text.strip().removeprefix("I: ")[:60])
        if made.returncode != 0:
            raise ClusterProblem(
                "mmdebstrap could not make the base image; is a Debian mirror reachable?\n  " + "\n  ".join(last)
            )
        oci.write_archive(archive, layer, base_reference(), architecture(), oci.ImageConfig())
        layer.unlink()
    for old in archive.parent.glob("base-*"):
        if old != archive:
            old.unlink()


def ctr(settings: Settings, *arguments: str) -> str:
    """containerd's own command on our containerd; its output."""
    argv = ["ctr", "--address", str(settings.containerd_socket), "--namespace", IMAGE_NAMESPACE, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterProblem(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
    return done.stdout


def stored(settings: Settings) -> list[str]:
    """Names of the images in the store that a person gave, without the digests that name the same images."""
    names = ctr(settings, "images", "list", "--quiet").split()
    return sorted(name for name in names if not name.startswith("sha256:") and "@" not in name)


def import_archive(settings: Settings, archive: Path) -> None:
    ctr(settings, "images", "import", str(archive))


def import_node_images(settings: Settings) -> None:
    """Bring the pause and the base image into the store unless they are there."""
    present = stored(settings)
    pause = binaries.programs(settings)["pause"]
    if pause_reference(pause) not in present:
        folder = settings.cluster / "tmp"
        oci.write_single_file_layer(folder / "pause.layer", pause)
        config = oci.ImageConfig(entrypoint=("/pause",), user=f"{POD_UID}:{POD_UID}")
        oci.write_archive(folder / "pause.tar", folder / "pause.layer", pause_reference(pause), architecture(), config)
        import_archive(settings, folder / "pause.tar")
    if base_reference() not in present:
        make_base(settings)
        with Progress("base image", done="imported"):
            import_archive(settings, base_archive(settings))


def in_use(settings: Settings) -> set[str]:
    """Names of the images that a container in the store was made from."""
    rows = ctr(settings, "containers", "list").splitlines()[1:]
    return {row.split()[1] for row in rows if len(row.split()) > 1}


def superseded(present: list[str], wanted_last: dict[str, float], kept: set[str], keep: int) -> list[str]:
    """Our images to delete: of each name all tags but the `keep` last asked for, and none of `kept`. Pure."""
    by_name: dict[str, list[str]] = {}
    for reference in present:
        if reference.startswith("localhost/finetune-"):
            by_name.setdefault(reference.rpartition(":")[0], []).append(reference)
    found: list[str] = []
    for references in by_name.values():
        newest_first = sorted(references, key=lambda reference: wanted_last.get(reference, 0.0), reverse=True)
        found += [reference for reference in newest_first[keep:] if reference not in kept]
    return sorted(found)


def _requests_path(settings: Settings) -> Path:
    return settings.state / "image-requests.json"


def read_requests(settings: Settings) -> dict[str, float]:
    """When each image was last asked for, in seconds since 1970."""
    try:
        requests: dict[str, float] = json.loads(_requests_path(settings).read_text())
    except FileNotFoundError:
        return {}
    return requests


def note_request(settings: Settings, reference: str, now: float) -> None:
    path = _requests_path(settings)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**read_requests(settings), reference: now}))
    unfinished.replace(path)


def collect(settings: Settings, keep: int) -> list[str]:
    """Delete superseded images; their names."""
    node_images = {base_reference(), pause_reference(binaries.programs(settings)["pause"])}
    gone = superseded(stored(settings), read_requests(settings), in_use(settings) | node_images, keep)
    for reference in gone:
        ctr(settings, "images", "rm", "--sync", reference)
    return gone
