"""Adds a LoRA adapter to its base model, shard by shard, and proves from the written files that it was added.

stages/merge.py calls merge(). Headers give the plan: which base tensors change, how the output's shards lie. Then
shard_rewriting copies and patches, and verify_target reads rows of every changed tensor back and computes them again.
No model library and no torch: a merge of any size needs the memory of a few blocks and of one adapter matrix pair.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.adapters import (
    ADAPTER_WEIGHTS_NAME,
    AdapterTarget,
    has_tied_embeddings,
    match_adapter,
    read_adapter_config,
)
from finetune_trainer.contract import ContractError
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.model_files import INDEX_NAME, SINGLE_NAME, ModelFiles, read_model_config
from finetune_trainer.safetensors_stream import (
    Header,
    TensorInfo,
    TensorPlan,
    TensorReader,
    encode_header,
    read_header,
    some_names,
)
from finetune_trainer.shard_rewriting import Change, Output, Patch, Segment, Source, Stream, WrittenFile, rewrite
from finetune_trainer.tensor_dtypes import FLOAT_DTYPES, Floats, rounding_step, to_float32

DEFAULT_SHARD_BYTES = 5_000_000_000

_FLOAT32_ROUNDING = 2.0**-24
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, from headers alone. `shard_bytes` is None where the base's own shards are kept."""

    base: ModelFiles
    adapter: Path
    targets: tuple[AdapterTarget, ...]
    shard_bytes: int | None


@dataclass(frozen=True)
class TargetProof:
    """Evidence for one changed tensor.

    `changed` of `elements` values differ from the base; `delta_norm` is the Frobenius norm of what was added before
    rounding; `max_difference` is the largest |merged - base| after it; `sampled` values were read back from the written
    file and equal the sum computed again in float64, within one rounding.
    """

    target: AdapterTarget
    elements: int
    changed: int
    delta_norm: float
    max_difference: float
    sampled: int

    def as_json(self) -> dict[str, Any]:
        return {
            "module": self.target.module,
            "rank": self.target.rank,
            "scale": self.target.scale,
            "elements": self.elements,
            "changed": self.changed,
            # Six digits: the last ones of a sum depend on the processor, and a manifest's digest must not.
            "deltaNorm": float(f"{self.delta_norm:.6g}"),
            "maxDifference": float(f"{self.max_difference:.6g}"),
            "sampled": self.sampled,
        }


@dataclass(frozen=True)
class Merged:
    """The written shards (and the index, where there is one) and a proof for each target."""

    files: tuple[WrittenFile, ...]
    proofs: tuple[TargetProof, ...]

    @property
    def max_difference(self) -> float:
        return max(proof.max_difference for proof in self.proofs)


def parse_bytes(text: str | int, field: str) -> int:
    """Bytes of a quantity such as 5GB, 500M or 2Gi (K, M, G, T count by 1000, Ki, Mi, Gi, Ti by 1024)."""
    match = _QUANTITY.fullmatch(str(text).strip())
    if match is None or (match[3] and not match[2]) or float(match[1]) <= 0:
        raise ContractError(f"{field} is {text!r}, expected a quantity above zero such as 5GB or 2Gi")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2]])


def plan_merge(base: ModelFiles, adapter: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> MergePlan:
    """What merging `adapter` into `base` takes; reads headers and configurations only.

    Raises what match_adapter raises; UserError for a base whose weights are quantised or of a dtype that a delta cannot
    be added to.
    """
    model_config = read_model_config(base.folder)
    if model_config.get("quantization_config"):
        raise UserError(
            "QuantizedBase",
            f"{base.folder.name}: its config.json has a quantization_config: merge into the unquantised model instead",
        )
    header = read_header(adapter / ADAPTER_WEIGHTS_NAME)
    targets = match_adapter(
        read_adapter_config(adapter),
        {name: tensor.shape for name, tensor in header.tensors.items()},
        {name: tensor.shape for name, tensor in base.tensors.items()},
        tied_embeddings=has_tied_embeddings(model_config, base.tensors),
    )
    unsupported = [
        f"{tensor.name} ({tensor.dtype})"
        for tensor in [base.tensors[target.base] for target in targets]
        + [header.tensors[name] for target in targets for name in (target.a, target.b)]
        if tensor.dtype not in FLOAT_DTYPES
    ]
    if unsupported:
        raise UserError("UnsupportedDtype", f"cannot add to {some_names(unsupported)}: only {', '.join(FLOAT_DTYPES)}")
    fits = all(shard.size - shard.data_start <= max_shard_bytes for shard in base.shards)
    return MergePlan(base, adapter, tuple(targets), None if fits else max_shard_bytes)


def merge(plan: MergePlan, output: Path, digests: Mapping[str, str], cpus: int) -> Merged:
    """Write the merged shards, and their index where the base has one or there are several, into the folder `output`.

    `digests` are the base's files' sha256 by name, where known: what is read is held against them. RetryableError when
    the volume has no room; CorruptArtifact when the base is damaged or the written files do not hold the sum; UserError
    when an adapter value is not finite or a sum does not fit the base's dtype.
    """
    _check_room(plan, output)
    with TensorReader(plan.adapter / ADAPTER_WEIGHTS_NAME) as adapter:
        patches = {target.base: _patch_loader(target, plan.base, adapter) for target in plan.targets}
        if plan.shard_bytes is None:
            streams = [_keep_shard(shard, output, patches, digests) for shard in plan.base.shards]
        else:
            streams = [_lay_out_again(plan.base, plan.shard_bytes, output, patches, digests)]
        files = rewrite(streams, cpus)
        changes = {name: change for stream in streams for name, change in stream.changes.items()}
        for name, change in changes.items():
            _check_finite(plan.base.tensors[name], change)
        written = {name: header for header in map(_header_of, files) for name in header.tensors}
        sampled = {name: verify_target(plan.base, written[name], patches[name]()) for name in patches}
    proofs = tuple(
        TargetProof(
            target=target,
            elements=plan.base.tensors[target.base].elements,
            changed=changes[target.base].changed,
            delta_norm=math.sqrt(changes[target.base].delta_squares),
            max_difference=changes[target.base].max_difference,
            sampled=sampled[target.base],
        )
        for target in plan.targets
    )
    return Merged(tuple(files), proofs)


def index_of(files: Sequence[WrittenFile]) -> dict[str, Any]:
    """The index of the written shards: which file holds which tensor, and the bytes of all tensors."""
    headers = [read_header(file.path) for file in files]
    total = sum(header.size - header.data_start for header in headers)
    names = {name: header.path.name for header in headers for name in header.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}


def needs_index(base: ModelFiles, files: Sequence[WrittenFile]) -> bool:
    """One file of the plain name needs no index."""
    return len(files) > 1 or files[0].path.name != SINGLE_NAME or (base.folder / INDEX_NAME).is_file()


def verify_target(base: ModelFiles, file: Header, patch: Patch) -> int:
    """Read the first, middle and last row of a merged tensor back from `file` and compute them again in float64.

    Returns how many values were compared. CorruptArtifact when one differs by more than the rounding of its dtype.
    """
    tensor = patch.tensor
    written = file.tensor(tensor.name)
    rows, columns = tensor.shape
    row_bytes = columns * (tensor.nbytes // tensor.elements)
    chosen = sorted({0, rows // 2, rows - 1})
    with TensorReader(base.shard_of[tensor.name].path) as old_file, TensorReader(file.path) as new_file:
        for row in chosen:
            old = _read_row(old_file, tensor, row, row_bytes)
            new = _read_row(new_file, written, row, row_bytes)
            left = patch.left[row].astype(np.float64)
            right = patch.right.astype(np.float64)
            exact = old + patch.scale * (left @ right)
            size = np.abs(old) + abs(patch.scale) * (np.abs(left) @ np.abs(right))
            # One rounding to the dtype, and float32's own for each product and sum on the way.
            allowed = 0.5 * rounding_step(np.maximum(np.abs(exact), np.abs(new)), tensor.dtype)
            allowed += (len(left) + 3) * _FLOAT32_ROUNDING * size
            if not np.all(np.abs(new - exact) <= allowed):
                column = int(np.argmax(np.abs(new - exact) - allowed))
                raise CorruptArtifact(
                    f"{file.path.name}: {tensor.name!r} [{row}, {column}] is {new[column]!r} on disk, base plus "
                    f"adapter is {exact[column]!r}: the volume or the merge is at fault, run merge again"
                )
    return len(chosen) * columns


def _header_of(file: WrittenFile) -> Header:
    return read_header(file.path)


def _read_row(reader: TensorReader, tensor: TensorInfo, row: int, row_bytes: int) -> Any:
    start = tensor.start + row * row_bytes
    data = reader.read_range(start, start + row_bytes)
    return to_float32(data, tensor.dtype, (tensor.shape[1],)).astype(np.float64)


def _patch_loader(target: AdapterTarget, base: ModelFiles, adapter: TensorReader) -> Callable[[], Patch]:
    def load() -> Patch:
        a, b = (_read_matrix(adapter, name) for name in (target.a, target.b))
        left, right = (a.T, b.T) if target.transposed else (b, a)
        return Patch(base.tensors[target.base], np.ascontiguousarray(left), np.ascontiguousarray(right), target.scale)

    return load


def _read_matrix(adapter: TensorReader, name: str) -> Floats:
    tensor = adapter.header.tensor(name)
    values = to_float32(adapter.read(tensor), tensor.dtype, tensor.shape)
    if not np.isfinite(values).all():
        raise UserError(
            "AdapterNotFinite",
            f"{adapter.header.path.name}: {name!r} has values that are NaN or infinite: the training diverged, "
            "lower learningRate",
        )
    return values


def _keep_shard(
    shard: Header, output: Path, patches: Mapping[str, Callable[[], Patch]], digests: Mapping[str, str]
) -> Stream:
    """The shard with its own header and offsets: runs of unchanged tensors are one range."""
    segments = []
    copied = 0
    for tensor in shard.tensors.values():
        if tensor.name not in patches:
            continue
        if tensor.start > copied:
            segments.append(Segment(copied, tensor.start, 0, copied))
        segments.append(Segment(tensor.start, tensor.end, 0, tensor.start, patches[tensor.name]))
        copied = tensor.end
    if copied < shard.size:
        segments.append(Segment(copied, shard.size, 0, copied))
    name = shard.path.name
    return Stream([Source(shard.path, segments, digests.get(name))], [Output(output / name)])


def _lay_out_again(
    base: ModelFiles,
    shard_bytes: int,
    output: Path,
    patches: Mapping[str, Callable[[], Patch]],
    digests: Mapping[str, str],
) -> Stream:
    """Tensors in the base's order into new shards of at most `shard_bytes`, a larger tensor alone in its own."""
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for shard in base.shards:
        for tensor in shard.tensors.values():
            if groups[-1] and size + tensor.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
    metadata = {"format": "pt", **base.shards[0].metadata}
    outputs = []
    places: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        name = SINGLE_NAME if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        header = encode_header([TensorPlan(tensor.name, tensor.dtype, tensor.shape) for tensor in group], metadata)
        outputs.append(Output(output / name, header))
        offset = len(header)
        for tensor in group:
            places[tensor.name] = (number, offset)
            offset += tensor.nbytes
    sources = []
    for shard in base.shards:
        segments = [Segment(0, shard.data_start, None, 0)]
        for tensor in shard.tensors.values():
            segments.append(Segment(tensor.start, tensor.end, *places[tensor.name], patches.get(tensor.name)))
        sources.append(Source(shard.path, segments, digests.get(shard.path.name)))
    return Stream(sources, outputs)


def _check_finite(tensor: TensorInfo, change: Change) -> None:
    if not math.isfinite(change.max_difference):
        raise UserError(
            "MergeNotFinite",
            f"{tensor.name!r} would hold values that are infinite or no numbers in {tensor.dtype}: "
            "the base is damaged or the adapter too large for that dtype",
        )


def _check_room(plan: MergePlan, output: Path) -> None:
    needed = sum(shard.size for shard in plan.base.shards)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise RetryableError(
            "VolumeFull", f"the merged model takes {needed} bytes and {output} has {free} free: enlarge the volume"
        )


def encode_index(index: Mapping[str, Any]) -> bytes:
    """The bytes of model.safetensors.index.json."""
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
