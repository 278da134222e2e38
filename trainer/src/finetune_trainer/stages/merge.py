"""The merge stage: base model and adapter become one model folder that transformers loads as it is.

Reads inputs `model` and `consolidate`; writes safetensors shards, their index, and the base's configuration and
tokenizer files. The base's bytes are verified while they are copied, so they are read once.
"""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.artifacts import ArtifactWriter, FileEntry, new_artifact, open_input, read_manifest
from finetune_trainer.contract import CONSOLIDATE, MERGE, MODEL_INPUT, Report, StageConfig
from finetune_trainer.cpus import available_cpus
from finetune_trainer.merging import (
    DEFAULT_SHARD_BYTES,
    MergePlan,
    encode_index,
    index_of,
    merge,
    needs_index,
    parse_bytes,
    plan_merge,
)
from finetune_trainer.model_files import INDEX_NAME, is_companion_file, read_model_files
from finetune_trainer.stage import finished_report, keep_report


def run(config: StageConfig) -> Report:
    """Merge; see merging for what is refused and proved."""
    settings = config.spec.get("merge") or {}
    max_shard_bytes = parse_bytes(settings.get("maxShardSize") or DEFAULT_SHARD_BYTES, "spec.merge.maxShardSize")
    model = open_input(config, MODEL_INPUT, contents=False)
    adapter = open_input(config, CONSOLIDATE)
    known = {entry.path: entry for entry in read_manifest(model).files}
    plan = plan_merge(read_model_files(model), adapter, max_shard_bytes)
    _print_plan(plan)
    with new_artifact(config.output_path, MERGE) as writer:
        result = merge(plan, writer.folder, {name: entry.sha256 for name, entry in known.items()}, available_cpus())
        for file in result.files:
            writer.record(file.path.name, file.size, file.sha256)
        if needs_index(plan.base, result.files):
            writer.write(INDEX_NAME, encode_index(index_of(result.files)))
        copied = _copy_companions(model, known, writer)
        writer.metadata["targets"] = {proof.target.base: proof.as_json() for proof in result.proofs}
        metrics = {
            "tensors": len(plan.base.tensors),
            "targets": len(result.proofs),
            "bytes": sum(file.size for file in result.files),
            "shards": len(result.files),
            "maxDifference": float(f"{result.max_difference:.6g}"),
            "changedValues": sum(proof.changed for proof in result.proofs),
            "sampledValues": sum(proof.sampled for proof in result.proofs),
        }
        keep_report(writer, metrics)
    for proof in result.proofs:
        if proof.changed == 0:
            print(f"warning: {proof.target.base} is unchanged, its delta rounds to nothing", flush=True)
    print(
        f"wrote {metrics['bytes']} bytes in {metrics['shards']} shards and {copied} other files; "
        f"{metrics['changedValues']} values changed, by at most {metrics['maxDifference']}; {metrics['sampledValues']} "
        "values read back from the files equal base plus adapter",
        flush=True,
    )
    return finished_report(config)


def _print_plan(plan: MergePlan) -> None:
    layout = "the base's shards" if plan.shard_bytes is None else f"new shards of at most {plan.shard_bytes} bytes"
    print(
        f"merging {len(plan.targets)} modules into {len(plan.base.tensors)} tensors of {plan.base.nbytes} bytes, "
        f"laid out as {layout}",
        flush=True,
    )


def _copy_companions(model: Path, known: dict[str, FileEntry], writer: ArtifactWriter) -> int:
    """Copy configuration and tokenizer files; returns how many. Artifacts share no inodes: one may be deleted alone."""
    names = sorted(name for name in known if is_companion_file(name))
    for name in names:
        with (model / name).open("rb") as source, writer.open(name) as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
    return len(names)
