"""Puts an adapter into its base model, shard by shard, and proves from the written files that it was put in.

merged_model.py calls plan_merge() and merge(). Headers give the plan: which tensors change, how the output's shards
lie, what memory it takes. Then shard_rewriting copies and edits, and verify_target reads rows of every changed tensor
back and computes them again. No model library and no torch: a merge of any size needs the memory of a few blocks and
of the adapter's matrices for one tensor.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.adapters import (
    ADAPTER_WEIGHTS_NAME,
    AdapterMatch,
    AdapterTarget,
    match_adapter,
    read_adapter_config,
)
from finetune_trainer.contract import ContractError
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.model_files import (
    ModelFiles,
    check_unquantized,
    group_by_size,
    read_model_config,
    shard_name,
)
from finetune_trainer.safetensors_stream import (
    ITEM_BYTES,
    Header,
    TensorInfo,
    TensorPlan,
    TensorReader,
    encode_header,
    read_header,
    some_names,
)
from finetune_trainer.shard_rewriting import (
    BLOCK_BYTES,
    Listener,
    Output,
    Segment,
    Source,
    Stream,
    WrittenFile,
    memory_bytes,
    rewrite,
    streams_at_once,
)
from finetune_trainer.tensor_dtypes import FLOAT_DTYPES, Floats, rounding_step, to_float32
from finetune_trainer.tensor_edits import Change, Edit, Product, column_factor

DEFAULT_SHARD_BYTES = 5_000_000_000
PRECISIONS: Mapping[str, str | None] = {"base": None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Values of merge.precision, and the dtype that every float tensor then gets; None: each keeps its own."""

PROCESS_BYTES = 96 << 20
"""What a merging process takes before it reads a tensor: interpreter, numpy and its BLAS, threads' stacks."""
_TENSOR_BYTES = 4096
"""What planning holds for a tensor of the base or the adapter: names, header entries, segments."""

_FLOAT32_ROUNDING = 2.0**-24
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the merged model: from which of the base's, in which dtype, and what changes it."""

    name: str
    source: TensorInfo
    dtype: str
    target: AdapterTarget | None

    @property
    def nbytes(self) -> int:
        return self.source.elements * ITEM_BYTES[self.dtype]

    @property
    def is_edited(self) -> bool:
        return self.target is not None or self.dtype != self.source.dtype


@dataclass(frozen=True)
class PlannedShard:
    """A file of the merged model. `kept` is the base's shard whose header and offsets it has, else it has its own."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    kept: Header | None = None

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The header of a shard that is not kept."""
        plan = [TensorPlan(tensor.name, tensor.dtype, tensor.source.shape) for tensor in self.tensors]
        return encode_header(plan, metadata)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, from headers alone."""

    base: ModelFiles
    adapter: Header
    match: AdapterMatch
    shards: tuple[PlannedShard, ...]
    dtype: str | None

    @property
    def targets(self) -> tuple[AdapterTarget, ...]:
        return self.match.targets

    @property
    def keeps_layout(self) -> bool:
        return all(shard.kept is not None for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the merged model."""
        return sum(shard.data_bytes for shard in self.shards)

    def memory_bytes(self, cpus: int) -> int:
        """An upper bound of the process' resident memory during the merge, whatever the size of the model."""
        streams = len(self.shards) if self.keeps_layout else 1
        edited = [tensor for shard in self.shards for tensor in shard.tensors if tensor.is_edited]
        largest_row = max((_row_bytes(tensor) for tensor in edited), default=0)
        matrices = max((self._matrix_bytes(target) for target in self.targets), default=0)
        planned = len(self.base.tensors) + len(self.adapter.tensors)
        at_once = streams_at_once(cpus, streams)
        return (
            PROCESS_BYTES
            + planned * _TENSOR_BYTES
            + memory_bytes(cpus, streams, largest_row)
            # Read, widened to float32 and laid out for the product; the next target's while blocks of one are at work.
            + 2 * at_once * matrices
        )

    def _matrix_bytes(self, target: AdapterTarget) -> int:
        names = (target.a, target.b, target.magnitude, target.addend)
        return sum(
            self.adapter.tensors[name].nbytes + 8 * self.adapter.tensors[name].elements for name in names if name
        )


@dataclass(frozen=True)
class TargetProof:
    """Evidence for one changed tensor.

    `changed` of `elements` values differ from the base; `delta_norm` is the Frobenius norm of what was added before
    rounding; `max_difference` is the largest |merged - base| after it; `sampled` values were read back from the written
    file and equal the values computed again in float64, within one rounding.
    """

    target: AdapterTarget
    elements: int
    changed: int
    delta_norm: float
    max_difference: float
    sampled: int

    def as_json(self) -> dict[str, Any]:
        return {
            **self.target.as_json(),
            "elements": self.elements,
            "changed": self.changed,
            # Six digits: the last ones of a sum depend on the processor, and a manifest's digest must not.
            "deltaNorm": float(f"{self.delta_norm:.6g}"),
            "maxDifference": float(f"{self.max_difference:.6g}"),
            "sampled": self.sampled,
        }


@dataclass(frozen=True)
class Merged:
    """The written shards in the plan's order, and a proof for each target."""

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


def parse_precision(value: Any, field: str) -> str | None:
    """The dtype that merge.precision asks for, None for the base's own; ContractError names `field`."""
    if not isinstance(value, str) or value not in PRECISIONS:
        raise ContractError(f"{field} is {value!r}, expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[value]


def plan_merge(
    base: ModelFiles, adapter: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, dtype: str | None = None
) -> MergePlan:
    """What merging the adapter folder into `base` takes; reads headers and configurations only.

    With `dtype` every float tensor is written in it. Raises what match_adapter raises; UserError for a base whose
    weights are quantised or of a dtype that nothing can be added to.
    """
    model_config = read_model_config(base.folder)
    check_unquantized(base.folder, base.tensors)
    header = read_header(adapter / ADAPTER_WEIGHTS_NAME)
    match = match_adapter(
        read_adapter_config(adapter),
        {name: tensor.shape for name, tensor in header.tensors.items()},
        {name: tensor.shape for name, tensor in base.tensors.items()},
        model_config,
    )
    _check_dtypes(base, header, match, dtype)
    return MergePlan(base, header, match, _plan_shards(base, match, max_shard_bytes, dtype), dtype)


def merge(
    plan: MergePlan,
    output: Path,
    digests: Mapping[str, str],
    cpus: int,
    finished: Sequence[WrittenFile] = (),
    listener: Listener | None = None,
) -> Merged:
    """Write the merged shards into the folder `output`, but for those that already are there, `finished`.

    `digests` are the base's files' sha256 by name, where known: what is read is held against them. RetryableError when
    the volume has no room; CorruptArtifact when the base is damaged or the written files do not hold the sum; UserError
    when an adapter value is not finite or a sum does not fit the dtype.
    """
    done = {file.path.name: file for file in finished}
    _check_room(plan, output, done)
    with TensorReader(plan.adapter.path) as adapter:
        edits = {
            tensor.name: partial(_load_edit, tensor, plan.base, adapter)
            for shard in plan.shards
            for tensor in shard.tensors
            if tensor.is_edited
        }
        if plan.keeps_layout:
            streams = [_keep_shard(shard, output, edits, digests) for shard in plan.shards if shard.name not in done]
        else:
            streams = [_lay_out_again(plan, output, edits, digests, done)]
        done |= {file.path.name: file for file in rewrite(streams, cpus, listener)}
        proofs = tuple(_prove(plan, shard, done[shard.name], edits) for shard in plan.shards)
    by_tensor = {proof.target.tensor: proof for some in proofs for proof in some}
    files = tuple(done[shard.name] for shard in plan.shards)
    return Merged(files, tuple(by_tensor[target.tensor] for target in plan.targets))


def verify_target(base: ModelFiles, file: Header, edit: Edit) -> int:
    """Read the first, middle and last row of a merged tensor back from `file` and compute them again in float64.

    Returns how many values were compared. CorruptArtifact when one differs by more than the rounding of its dtype.
    """
    written = file.tensor(edit.name)
    chosen = sorted({0, edit.rows // 2, edit.rows - 1})
    with TensorReader(base.shard_of[edit.tensor.name].path) as old_file, TensorReader(file.path) as new_file:
        for row in chosen:
            old = _read_rows(old_file, edit.tensor, edit.columns, row, row + 1)[0].astype(np.float64)
            new = _read_rows(new_file, written, edit.columns, row, row + 1)[0].astype(np.float64)
            exact, error = _recompute(edit, old, row)
            allowed = 0.5 * rounding_step(np.maximum(np.abs(exact), np.abs(new)), edit.dtype) + error
            if not np.all(np.abs(new - exact) <= allowed):
                column = int(np.argmax(np.abs(new - exact) - allowed))
                raise CorruptArtifact(
                    f"{file.path.name}: {edit.name!r} [{row}, {column}] is {new[column]!r} on disk, base plus adapter "
                    f"is {exact[column]!r}: the volume or the merge is at fault, run merge again"
                )
    return len(chosen) * edit.columns


def _recompute(edit: Edit, old: Any, row: int) -> tuple[Any, Any]:
    """A row as it should be, in float64, and how far float32's own roundings may have moved it."""
    exact = old if edit.stored is None else edit.stored(row, row + 1)[0].astype(np.float64)
    error = np.zeros_like(exact)
    if edit.product is not None:
        left, right = edit.product.left[row].astype(np.float64), edit.product.right.astype(np.float64)
        size = np.abs(exact) + abs(edit.product.scale) * (np.abs(left) @ np.abs(right))
        exact = exact + edit.product.scale * (left @ right)
        # One for each product and sum on the way.
        error = (len(left) + 3) * _FLOAT32_ROUNDING * size
    if edit.addend is not None:
        error = error + 2 * _FLOAT32_ROUNDING * (np.abs(exact) + abs(float(edit.addend[row])))
        exact = exact + float(edit.addend[row])
    factor: Any = 1.0
    if edit.magnitude is not None:
        length = math.sqrt(float(np.square(exact).sum()))
        factor = float(edit.magnitude[row]) / length
        error = error + np.abs(exact) * (math.sqrt(float(np.square(error).sum())) / length)
    if edit.column_factor is not None:
        factor = edit.column_factor.astype(np.float64)
    exact = exact * factor
    return exact, error * np.abs(factor) + 4 * _FLOAT32_ROUNDING * np.abs(exact)


def _check_dtypes(base: ModelFiles, adapter: Header, match: AdapterMatch, dtype: str | None) -> None:
    used = [base.tensors[target.base] for target in match.targets]
    used += [adapter.tensors[name] for target in match.targets for name in target.adapter_tensors]
    unsupported = [f"{tensor.name} ({tensor.dtype})" for tensor in used if tensor.dtype not in FLOAT_DTYPES]
    if unsupported:
        raise UserError("UnsupportedDtype", f"cannot add to {some_names(unsupported)}: only {', '.join(FLOAT_DTYPES)}")
    if dtype is not None:
        floats = [tensor for tensor in base.tensors.values() if tensor.dtype.startswith("F")]
        foreign = [f"{tensor.name} ({tensor.dtype})" for tensor in floats if tensor.dtype not in FLOAT_DTYPES]
        if foreign:
            raise UserError(
                "UnsupportedDtype", f"cannot convert {some_names(foreign)} to {dtype}: leave merge.precision at base"
            )


def _plan_shards(
    base: ModelFiles, match: AdapterMatch, max_shard_bytes: int, dtype: str | None
) -> tuple[PlannedShard, ...]:
    targets = {target.tensor: target for target in match.targets}

    def planned(name: str, source: TensorInfo) -> PlannedTensor:
        converted = dtype if dtype is not None and source.dtype in FLOAT_DTYPES else source.dtype
        return PlannedTensor(match.prefix + name, source, converted, targets.get(name))

    shards = [[planned(name, tensor) for name, tensor in shard.tensors.items()] for shard in base.shards]
    new = match.output_layer if match.output_layer not in base.tensors else None
    same = new is None and all(tensor.dtype == tensor.source.dtype for shard in shards for tensor in shard)
    if same and all(shard.size - shard.data_start <= max_shard_bytes for shard in base.shards):
        return tuple(
            PlannedShard(shard.path.name, tuple(tensors), shard)
            for shard, tensors in zip(base.shards, shards, strict=True)
        )
    tensors = [tensor for shard in shards for tensor in shard]
    if new is not None and match.untied is not None:
        at = next(number for number, tensor in enumerate(tensors) if tensor.source.name == match.untied)
        # The output layer has its own name already, with the first component that files of bare models lack or without.
        own = planned(new, base.tensors[match.untied])
        tensors.insert(at + 1, PlannedTensor(new, own.source, own.dtype, own.target))
    groups = group_by_size([tensor.nbytes for tensor in tensors], max_shard_bytes)
    return tuple(
        PlannedShard(shard_name(number, len(groups)), tuple(tensors[at] for at in group))
        for number, group in enumerate(groups, start=1)
    )


def _keep_shard(
    planned: PlannedShard, output: Path, edits: Mapping[str, Callable[[], Edit]], digests: Mapping[str, str]
) -> Stream:
    """The base's shard with its own header and offsets: runs of unchanged tensors are one range."""
    shard = planned.kept
    assert shard is not None
    segments = []
    copied = 0
    for tensor in shard.tensors.values():
        if tensor.name not in edits:
            continue
        if tensor.start > copied:
            segments.append(Segment(copied, tensor.start, 0, copied))
        segments.append(Segment(tensor.start, tensor.end, 0, tensor.start, edits[tensor.name]))
        copied = tensor.end
    if copied < shard.size:
        segments.append(Segment(copied, shard.size, 0, copied))
    source = Source(shard.path, segments, digests.get(shard.path.name))
    return Stream([source], [Output(output / planned.name, shard.size, clone_of=shard.path)])


def _lay_out_again(
    plan: MergePlan,
    output: Path,
    edits: Mapping[str, Callable[[], Edit]],
    digests: Mapping[str, str],
    done: Mapping[str, WrittenFile],
) -> Stream:
    """Tensors in the base's order into shards with headers of their own; those in `done` are there already."""
    metadata = {"format": "pt", **plan.base.shards[0].metadata}
    outputs: list[Output] = []
    places: dict[str, list[tuple[PlannedTensor, int | None, int]]] = {}
    for shard in plan.shards:
        header = shard.header(metadata)
        number = None if shard.name in done else len(outputs)
        if number is not None:
            outputs.append(Output(output / shard.name, len(header) + shard.data_bytes, header))
        offset = len(header)
        for tensor in shard.tensors:
            places.setdefault(tensor.source.name, []).append((tensor, number, offset))
            offset += tensor.nbytes
    sources = []
    for base_shard in plan.base.shards:
        digest = digests.get(base_shard.path.name)
        segments = [Segment(0, base_shard.data_start, None, 0)]
        for source in base_shard.tensors.values():
            for number, (tensor, place, offset) in enumerate(places[source.name]):
                edit = edits.get(tensor.name) if place is not None else None
                segments.append(Segment(source.start, source.end, place, offset, edit, again=number > 0))
        # What is only read for a hash that nobody knows need not be read.
        wanted = [part for part in segments if part.output is not None or (digest is not None and not part.again)]
        sources.append(Source(base_shard.path, wanted, digest))
    return Stream(sources, outputs)


def _prove(
    plan: MergePlan, shard: PlannedShard, file: WrittenFile, edits: Mapping[str, Callable[[], Edit]]
) -> list[TargetProof]:
    header = read_header(file.path)
    proofs = []
    for tensor in shard.tensors:
        if not tensor.is_edited or not tensor.source.elements:
            continue
        change = file.changes[tensor.name]
        _check_finite(tensor, change)
        if tensor.target is None:
            continue
        proofs.append(
            TargetProof(
                target=tensor.target,
                elements=tensor.source.elements,
                changed=change.changed,
                delta_norm=math.sqrt(change.delta_squares),
                max_difference=change.max_difference,
                sampled=verify_target(plan.base, header, edits[tensor.name]()),
            )
        )
    return proofs


def _check_finite(tensor: PlannedTensor, change: Change) -> None:
    if not math.isfinite(change.max_difference):
        raise UserError(
            "MergeNotFinite",
            f"{tensor.name!r} would hold values that are infinite or no numbers in {tensor.dtype}: "
            "the base is damaged, or the adapter or the base's values are too large for that dtype (merge.precision)",
        )


def _load_edit(tensor: PlannedTensor, base: ModelFiles, adapter: TensorReader) -> Edit:
    target = tensor.target
    if target is None:
        return Edit(tensor.name, tensor.source, tensor.dtype)
    product = None
    if target.a is not None and target.b is not None:
        a, b = (_read_finite(adapter, name) for name in (target.a, target.b))
        left, right = (a.T, b.T) if target.transposed else (b, a)
        product = Product(np.ascontiguousarray(left), np.ascontiguousarray(right), target.scale)
    magnitude = None if target.magnitude is None else _read_finite(adapter, target.magnitude)
    edit = Edit(
        tensor.name,
        tensor.source,
        tensor.dtype,
        stored=None if target.stored is None else _stored_rows(adapter, target.stored),
        product=product,
        addend=None if target.addend is None else _read_finite(adapter, target.addend) * np.float32(target.scale),
        magnitude=None if target.transposed else magnitude,
    )
    if magnitude is None or not target.transposed:
        return edit
    with TensorReader(base.shard_of[tensor.source.name].path) as file:
        rows = partial(_read_rows, file, tensor.source, edit.columns)
        factor = column_factor(magnitude, edit, rows, max(1, BLOCK_BYTES // edit.row_bytes))
    return Edit(edit.name, edit.tensor, edit.dtype, edit.stored, edit.product, edit.addend, None, factor)


def _stored_rows(adapter: TensorReader, name: str) -> Callable[[int, int], Floats]:
    tensor = adapter.header.tensor(name)
    columns = tensor.elements // tensor.shape[0] if tensor.shape else 1

    def read(first: int, last: int) -> Floats:
        values = _read_rows(adapter, tensor, columns, first, last)
        _check_adapter_values(adapter, name, values)
        return values

    return read


def _read_rows(reader: TensorReader, tensor: TensorInfo, columns: int, first: int, last: int) -> Floats:
    row_bytes = columns * ITEM_BYTES[tensor.dtype]
    data = reader.read_range(tensor.start + first * row_bytes, tensor.start + last * row_bytes)
    return to_float32(data, tensor.dtype, (last - first, columns))


def _read_finite(adapter: TensorReader, name: str) -> Floats:
    tensor = adapter.header.tensor(name)
    values = to_float32(adapter.read(tensor), tensor.dtype, tensor.shape)
    _check_adapter_values(adapter, name, values)
    return values


def _check_adapter_values(adapter: TensorReader, name: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            "AdapterNotFinite",
            f"{adapter.header.path.name}: {name!r} has values that are NaN or infinite: the training diverged, "
            "lower learningRate",
        )


def _row_bytes(tensor: PlannedTensor) -> int:
    shape = tensor.source.shape
    if not shape or not tensor.source.elements:
        return 0
    return tensor.source.elements // shape[0] * max(ITEM_BYTES[tensor.dtype], ITEM_BYTES[tensor.source.dtype])


def _check_room(plan: MergePlan, output: Path, done: Mapping[str, WrittenFile]) -> None:
    needed = sum(shard.data_bytes for shard in plan.shards if shard.name not in done)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise RetryableError(
            "VolumeFull", f"the merged model takes {needed} bytes and {output} has {free} free: enlarge the volume"
        )
