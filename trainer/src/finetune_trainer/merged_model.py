"""Writes a merged model as an artifact, and goes on from the shards that a killed attempt left behind.

The merge stage and `finetune-trainer merge-adapter` call write_merged_model(). Shards are made in a work folder beside
the artifact, `<artifact>.work`: each that is complete gets a record of its digest and of what its edits did, and moves
into the artifact when all are there. An attempt that is killed in between leaves them to the next, which takes those
whose bytes still have their digest, if it merges the very same inputs in the same way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.adapters import ADAPTER_CONFIG_NAME
from finetune_trainer.artifacts import ArtifactWriter, hash_file
from finetune_trainer.contract import MANIFEST_NAME, digest_of
from finetune_trainer.errors import RetryableError, StageError
from finetune_trainer.locks import release_lock, try_lock
from finetune_trainer.merging import Merged, MergePlan, encode_index, index_of, merge, needs_index
from finetune_trainer.model_files import CONFIG_NAME, INDEX_NAME, is_companion_file, read_model_config
from finetune_trainer.shard_rewriting import Listener, WrittenFile
from finetune_trainer.tensor_edits import Change

_WORK_VERSION = 1
_KEY_NAME = "inputs.json"
_LOCK_NAME = "lock"
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class WrittenModel:
    """What was written: the merge with its proofs, shards taken from an earlier attempt, files copied beside them."""

    merged: Merged
    reused: int
    copied: int

    def metrics(self) -> dict[str, Any]:
        """Plain numbers for a report; equal for equal inputs."""
        return {
            "targets": len(self.merged.proofs),
            "bytes": sum(file.size for file in self.merged.files),
            "shards": len(self.merged.files),
            "maxDifference": float(f"{self.merged.max_difference:.6g}"),
            "changedValues": sum(proof.changed for proof in self.merged.proofs),
            "sampledValues": sum(proof.sampled for proof in self.merged.proofs),
        }


def write_merged_model(
    plan: MergePlan,
    writer: ArtifactWriter,
    output: Path,
    digests: Mapping[str, str],
    cpus: int,
    listener: Listener | None = None,
) -> WrittenModel:
    """Merge into the artifact that `writer` writes for `output`: shards, index, configuration, tokenizer.

    `digests` are the base's files' sha256 by name, where known. The proofs go into the writer's metadata. Raises what
    merge() raises; RetryableError when another process is at the same merge.
    """
    work = output.with_name(output.name + ".work")
    with _work_folder(work, plan, digests) as folder:
        finished = _take_finished(plan, folder)
        for file in finished:
            print(f"{file.path.name} is there from an earlier attempt, with the digest it should have", flush=True)
            if listener is not None:
                listener.wrote(file.size)
        merged = merge(plan, folder, digests, cpus, finished, _recording(listener))
        copied = _copy_companions(plan, writer)
        names = [shard.name for shard in plan.shards]
        if needs_index(plan.base, names):
            writer.write(INDEX_NAME, encode_index(index_of(merged.files)))
        for file in merged.files:
            file.path.rename(writer.folder / file.path.name)
            writer.record(file.path.name, file.size, file.sha256)
        writer.metadata["targets"] = {proof.target.tensor: proof.as_json() for proof in merged.proofs}
        if plan.match.untied is not None:
            writer.metadata["untied"] = {"embedding": plan.match.untied, "outputLayer": plan.match.output_layer}
    return WrittenModel(merged, len(finished), copied)


@contextmanager
def _work_folder(folder: Path, plan: MergePlan, digests: Mapping[str, str]) -> Iterator[Path]:
    """The locked work folder, emptied where it is another merge's. It stays when the next attempt can use it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / _LOCK_NAME)
    if lock.held_elsewhere:
        raise RetryableError("MergeRunning", f"another process is writing to {folder}: wait for it, or end it")
    keep = False
    try:
        key = json.dumps(_key(plan, digests), indent=2, sort_keys=True)
        key_path = folder / _KEY_NAME
        if not key_path.is_file() or key_path.read_text(encoding="utf-8") != key:
            for entry in folder.iterdir():
                if entry.name != _LOCK_NAME:
                    entry.unlink()
            _write_durably(key_path, key)
        yield folder
    except StageError as error:
        keep = isinstance(error, RetryableError)
        raise
    except BaseException:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        release_lock(lock.descriptor)


def _key(plan: MergePlan, digests: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a shard to be taken: the base's files, the adapter's contents, the layout."""
    files = {}
    for shard in plan.base.shards:
        facts = shard.path.stat()
        # By hand nobody knows the base's digests; its files are then told apart as make does it.
        files[shard.path.name] = digests.get(shard.path.name) or f"{facts.st_size} bytes of {facts.st_mtime_ns}"
    adapter = plan.adapter.path
    return {
        "version": _WORK_VERSION,
        "base": files,
        "adapter": hash_file(adapter),
        "adapterConfig": hash_file(adapter.with_name(ADAPTER_CONFIG_NAME)),
        "layout": digest_of(
            [
                [shard.name, shard.kept is not None, [[tensor.name, tensor.dtype] for tensor in shard.tensors]]
                for shard in plan.shards
            ]
        ),
    }


def _take_finished(plan: MergePlan, folder: Path) -> list[WrittenFile]:
    """The complete shards in the work folder; what else is there is removed."""
    finished = []
    for shard in plan.shards:
        path, record = folder / shard.name, _record_path(folder / shard.name)
        file = _read_record(path, record)
        if file is not None and path.is_file() and path.stat().st_size == file.size and hash_file(path) == file.sha256:
            finished.append(file)
        else:
            record.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    return finished


def _recording(listener: Listener | None) -> Listener:
    def finished(file: WrittenFile) -> None:
        value = {
            "size": file.size,
            "sha256": file.sha256,
            "changes": {
                name: [change.changed, change.delta_squares, change.max_difference]
                for name, change in file.changes.items()
            },
        }
        _write_durably(_record_path(file.path), json.dumps(value))
        if listener is not None:
            listener.finished(file)

    return Listener(wrote=listener.wrote if listener is not None else lambda _count: None, finished=finished)


def _read_record(path: Path, record: Path) -> WrittenFile | None:
    try:
        value = json.loads(record.read_bytes())
        changes = {name: Change(*numbers) for name, numbers in value["changes"].items()}
        return WrittenFile(path, value["size"], value["sha256"], changes)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _copy_companions(plan: MergePlan, writer: ArtifactWriter) -> int:
    """Copy configuration and tokenizer files; returns how many. Artifacts share no inodes: one may be deleted alone."""
    base = plan.base.folder
    names = sorted(entry.name for entry in base.iterdir() if entry.is_file() and is_companion_file(entry.name))
    config = _changed_config(plan)
    copied = 0
    for name in names:
        if name == MANIFEST_NAME:
            continue
        if name == CONFIG_NAME and config is not None:
            writer.write(name, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        else:
            copy_file(base / name, writer)
        copied += 1
    return copied


def copy_file(path: Path, writer: ArtifactWriter) -> None:
    """Copy a file into the artifact under its own name."""
    with path.open("rb") as source, writer.open(path.name) as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)


def _changed_config(plan: MergePlan) -> dict[str, Any] | None:
    """config.json of the merged model where it is not the base's."""
    changes: dict[str, Any] = {}
    config = dict(read_model_config(plan.base.folder))
    if plan.dtype is not None:
        names: Sequence[str] = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        changes |= dict.fromkeys(names, _DTYPE_NAMES[plan.dtype])
    if plan.match.untied is not None:
        changes["tie_word_embeddings"] = False
    if not changes:
        return None
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = {**nested, **changes}
    return config | changes
