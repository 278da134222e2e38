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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.adapters import ADAPTER_CONFIG_NAME
from finetune_trainer.artifacts import ArtifactWriter, hash_file
from finetune_trainer.contract import digest_of
from finetune_trainer.errors import RetryableError, StageError
from finetune_trainer.locks import release_lock, try_lock
from finetune_trainer.merging import Merged, MergePlan, merge
from finetune_trainer.model_folder import copy_companions, write_index
from finetune_trainer.shard_rewriting import Listener, WrittenFile
from finetune_trainer.tensor_edits import Change

_WORK_VERSION = 1
_KEY_NAME = "inputs.json"
_LOCK_NAME = "lock"


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
        untied = plan.match.untied is not None
        copied = copy_companions(plan.base.folder, writer, dtype=plan.dtype, untied=untied)
        write_index([file.path for file in merged.files], writer, plan.base)
        for file in merged.files:
            file.path.rename(writer.folder / file.path.name)
            writer.record(file.path.name, file.size, file.sha256)
        writer.metadata["targets"] = {proof.target.tensor: proof.as_json() for proof in merged.proofs}
        if untied:
            writer.metadata["untied"] = {"embedding": plan.match.untied, "outputLayer": plan.match.output_layer}
    return WrittenModel(merged, len(finished), copied)


def describe_plan(plan: MergePlan, cpus: int) -> str:
    """What will be done, in a few lines for people."""
    layout = "the base's shards" if plan.keeps_layout else f"{len(plan.shards)} new shards"
    dtype = "the base's dtypes" if plan.dtype is None else plan.dtype
    lines = [
        f"merging {len(plan.targets)} tensors of the adapter into {len(plan.base.tensors)} tensors of "
        f"{plan.base.nbytes} bytes, written as {layout} in {dtype}, with at most "
        f"{plan.memory_bytes(cpus) >> 20} MiB of memory",
        *(f"note: {remark}" for remark in plan.match.remarks),
    ]
    return "\n".join(lines)


def describe_merge(result: WrittenModel) -> str:
    """What was done, in a few lines for people."""
    metrics = result.metrics()
    unchanged = [proof.target.tensor for proof in result.merged.proofs if proof.changed == 0]
    lines = [f"warning: {name} is unchanged, its delta rounds to nothing" for name in unchanged]
    lines.append(
        f"wrote {metrics['bytes']} bytes in {metrics['shards']} shards ({result.reused} of them by an earlier attempt) "
        f"and {result.copied} other files; {metrics['changedValues']} values changed, by at most "
        f"{metrics['maxDifference']}; {metrics['sampledValues']} values read back from the files equal base plus "
        "adapter"
    )
    return "\n".join(lines)


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
