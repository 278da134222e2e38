"""Artifacts: folders that are complete if and only if their manifest verifies.

Every stage, the sources and the checkpoints write folders through new_artifact and read them through open_input or
verify_artifact. A folder is written under a temporary name, its files and folders are fsynced, manifest.json goes last
and a rename publishes it, so a kill at any moment leaves either the whole artifact or a temporary folder that the next
writer removes.

The manifest is canonical JSON without times, host names or absolute paths: equal contents give an equal digest.
This module needs the standard library only and must not know what an artifact is for.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from finetune_trainer.contract import CONTRACT_VERSION, MANIFEST_NAME, ArtifactRef, StageConfig, canonical_json
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.json_files import is_count, is_plain_path, parse_json, read_small_file
from finetune_trainer.locks import release_lock, try_lock

_CHUNK = 1 << 20
_SAFETENSORS = ".safetensors"
_JSON_NAMES = {str: "text", list: "list", dict: "object"}


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: POSIX path relative to its folder, bytes, hex sha256."""

    path: str
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Manifest:
    """manifest.json, parsed. `digest` is "sha256:<hex>" of its bytes, `tensors` {file: {name: {"dtype", "shape"}}}."""

    kind: str
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    metadata: Mapping[str, Any]
    versions: Mapping[str, str]
    digest: str


class HashingFile:
    """A new file that is hashed while it is written. Sequential writes only; close() fsyncs.

    `size` in bytes and `sha256` in hex are valid after close().
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._hash.update(data)
        written = self._file.write(data)
        self.size += written
        return written

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class ArtifactWriter:
    """What new_artifact yields: write files under `folder`, facts into `metadata`.

    `versions` names the programs that made the artifact; leave it empty where they do not matter to the contents, since
    it is part of the digest.
    """

    folder: Path
    kind: str
    metadata: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    _recorded: dict[str, FileEntry] = field(default_factory=dict)

    def record(self, path: str, size: int, sha256: str) -> None:
        """Note a file that was hashed and fsynced while it was written, so that it is not read again."""
        self._recorded[path] = FileEntry(path, size, sha256)

    @contextmanager
    def open(self, path: str) -> Iterator[HashingFile]:
        """A new file at the relative `path`, recorded once it is closed."""
        with HashingFile(self.folder / path) as file:
            yield file
        self.record(path, file.size, file.sha256)

    def write(self, path: str, data: bytes) -> None:
        """A whole small file."""
        with self.open(path) as file:
            file.write(data)


@contextmanager
def new_artifact(path: Path, kind: str) -> Iterator[ArtifactWriter]:
    """Write the artifact `path`: yields a writer on a temporary sibling folder and publishes it at the end.

    On an exception the temporary folder goes. Where a complete artifact already is at `path` at the end, that one stays
    and the new one goes; an incomplete folder there is replaced. Temporary folders of dead writers are removed first.
    Raises CorruptArtifact when a recorded size or a safetensors header does not fit the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead_writers(path)
    folder, lock, lock_path = _claim_temporary(path)
    try:
        writer = ArtifactWriter(folder=folder, kind=kind)
        yield writer
        _write_manifest(writer)
        _publish(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        release_lock(lock)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the folder `path`, not checked against its files; CorruptArtifact when missing or broken."""
    file = path / MANIFEST_NAME
    try:
        data = read_small_file(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptArtifact(
            f"{path} has no {MANIFEST_NAME}: the artifact was never completed or was deleted; run its stage again"
        ) from error
    remedy = f"delete {path} and run its stage again"
    try:
        value = parse_json(data, MANIFEST_NAME)
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{file} is no manifest ({error.message}): {remedy}") from error
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{file} is no manifest (no JSON object): {remedy}")
    if value.get("contractVersion") != CONTRACT_VERSION:
        raise CorruptArtifact(
            f"{file} has contractVersion {value.get('contractVersion')!r}, this trainer reads {CONTRACT_VERSION}: "
            "delete the artifact's folder and run its stage again"
        )
    for name, kind in (("kind", str), ("files", list), ("tensors", dict), ("metadata", dict), ("versions", dict)):
        if not isinstance(value.get(name), kind):
            raise CorruptArtifact(f"{file} is no manifest ({name} is no {_JSON_NAMES[kind]}): {remedy}")
    for number, entry in enumerate(value["files"]):
        if not _is_file_entry(entry):
            raise CorruptArtifact(
                f"{file} is no manifest (files[{number}] has no path below the folder with size and sha256): {remedy}"
            )
    return Manifest(
        kind=value["kind"],
        files=tuple(FileEntry(entry["path"], entry["size"], entry["sha256"]) for entry in value["files"]),
        tensors=value["tensors"],
        metadata=value["metadata"],
        versions=value["versions"],
        digest="sha256:" + hashlib.sha256(data).hexdigest(),
    )


def verify_artifact(path: Path, digest: str | None = None, *, contents: bool = True) -> Manifest:
    """The manifest of `path` once every file is proved to be what it says.

    Checks the manifest against `digest` (when given), each file's presence and size, that no other file is there, and
    with `contents` each file's sha256. CorruptArtifact names the file, what was expected and what was found.
    """
    manifest = read_manifest(path)
    remedy = f"delete {path} and run its stage again"
    if digest is not None and manifest.digest != digest:
        raise CorruptArtifact(f"{path}: its manifest has digest {manifest.digest}, expected {digest}: {remedy}")
    expected = {entry.path: entry for entry in manifest.files}
    present = {name: size for name, size in _list_files(path) if name != MANIFEST_NAME}
    for name, entry in expected.items():
        if name not in present:
            raise CorruptArtifact(f"{path / name} is missing, expected {entry.size} bytes: {remedy}")
        if present[name] != entry.size:
            raise CorruptArtifact(f"{path / name} has {present[name]} bytes, expected {entry.size}: {remedy}")
    foreign = sorted(present.keys() - expected.keys())
    if foreign:
        raise CorruptArtifact(f"{path / foreign[0]} is not in the manifest: remove that file, or {remedy}")
    if contents:
        hashes = _hash_all([path / entry.path for entry in manifest.files])
        for entry, found in zip(manifest.files, hashes, strict=True):
            if found != entry.sha256:
                raise CorruptArtifact(f"{path / entry.path} has sha256 {found}, expected {entry.sha256}: {remedy}")
    return manifest


def find_artifact(path: Path) -> Manifest | None:
    """The manifest of `path` when a complete artifact is there by names and sizes, else None. Reads no contents."""
    try:
        return verify_artifact(path, contents=False)
    except CorruptArtifact:
        return None


def remove_artifact(path: Path) -> None:
    """Remove the folder `path` so that a kill in between leaves no half artifact under its name."""
    if path.exists():
        grave = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
        path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def artifact_ref(workspace: Path, path: Path) -> ArtifactRef:
    """The reference to the complete artifact at `path`, relative to the mounted `workspace`."""
    return ArtifactRef(path=path.relative_to(workspace).as_posix(), digest=read_manifest(path).digest)


def open_input(config: StageConfig, name: str, *, contents: bool = True) -> Path:
    """The folder of the input artifact `name`, verified against the digest that the operator passed.

    Raises contract.ContractError when stage.json has no such input, CorruptArtifact when it does not verify.
    """
    path = config.input_path(name)
    verify_artifact(path, config.input(name).digest, contents=contents)
    return path


def hash_file(path: Path, *, sync: bool = False) -> str:
    """Hex sha256 of a file; with `sync` it is fsynced too, whoever wrote it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := file.readinto(view):
            digest.update(view[:count])
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def read_tensor_header(path: Path) -> dict[str, dict[str, Any]]:
    """{name: {"dtype", "shape"}} of a safetensors file; CorruptArtifact when header and file size do not agree."""
    # That module hashes what it writes with this one's HashingFile.
    from finetune_trainer.safetensors_stream import read_header

    tensors = read_header(path).tensors.values()
    return {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors}


def _is_file_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_plain_path(value.get("path"))
        and is_count(value.get("size"))
        and isinstance(value.get("sha256"), str)
    )


def _write_manifest(writer: ArtifactWriter) -> None:
    sizes = dict(_list_files(writer.folder))
    for name, entry in writer._recorded.items():
        if sizes.get(name) != entry.size:
            found = f"{sizes[name]} bytes" if name in sizes else "no file"
            raise CorruptArtifact(f"{writer.folder / name}: recorded {entry.size} bytes, found {found}: run it again")
    unread = sorted(sizes.keys() - writer._recorded.keys())
    for name, digest in zip(unread, _hash_all([writer.folder / name for name in unread], sync=True), strict=True):
        writer.record(name, sizes[name], digest)
    entries = [writer._recorded[name] for name in sorted(sizes)]
    manifest = {
        "contractVersion": CONTRACT_VERSION,
        "kind": writer.kind,
        "files": [entry.as_json() for entry in entries],
        "tensors": {
            entry.path: read_tensor_header(writer.folder / entry.path)
            for entry in entries
            if entry.path.endswith(_SAFETENSORS)
        },
        "metadata": writer.metadata,
        "versions": writer.versions,
    }
    for folder in {writer.folder, *(parent for name in sizes for parent in _folders(writer.folder, name))}:
        _sync_folder(folder)
    with HashingFile(writer.folder / MANIFEST_NAME) as file:
        file.write(canonical_json(manifest))
    _sync_folder(writer.folder)


def _publish(folder: Path, path: Path) -> None:
    if find_artifact(path) is None:
        remove_artifact(path)
        try:
            folder.rename(path)
        except OSError:
            # Another writer published between the two lines; any other failure to rename is real.
            if find_artifact(path) is None:
                raise
    _sync_folder(path.parent)


def _claim_temporary(path: Path) -> tuple[Path, int | None, Path]:
    """A new temporary folder whose lock file this process holds, so that nobody takes it for a dead writer's."""
    while True:
        folder = path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}")
        lock_path = folder.with_name(folder.name + ".lock")
        lock = try_lock(lock_path)
        if lock.held_elsewhere:
            continue
        folder.mkdir()
        return folder, lock.descriptor, lock_path


def _remove_dead_writers(path: Path) -> None:
    """Remove temporary folders of `path` whose lock is free: their writer, or who was removing them, is dead.

    A writer has its lock before its folder and keeps it after, so a folder without a lock file is nobody's either. On a
    volume without working locks nothing is removed.
    """
    for name in {entry.name.removesuffix(".lock") for entry in path.parent.glob(f".{path.name}.tmp-*")}:
        lock_path = path.with_name(name + ".lock")
        lock = try_lock(lock_path)
        if lock.descriptor is not None:
            shutil.rmtree(path.with_name(name), ignore_errors=True)
            lock_path.unlink(missing_ok=True)
            release_lock(lock.descriptor)


def _list_files(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative POSIX path, bytes) of every file under `folder`; CorruptArtifact for links and special files."""
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if name.startswith(".nfs"):
                continue  # an NFS client's name for a file that is deleted but still open
            file = Path(root) / name
            facts = file.lstat()
            if stat.S_ISREG(facts.st_mode):
                yield file.relative_to(folder).as_posix(), facts.st_size
            elif not stat.S_ISDIR(facts.st_mode):
                raise CorruptArtifact(f"{file} is a link or a special file: an artifact holds regular files only")


def _folders(base: Path, name: str) -> Iterator[Path]:
    for parent in Path(name).parents:
        yield base / parent


def _hash_all(paths: list[Path], *, sync: bool = False) -> list[str]:
    # hashlib lets go of the interpreter lock, so threads hash in parallel.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: hash_file(path, sync=sync), paths))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
