"""The merge stage: base model and adapter become one model folder that transformers loads as it is.

Reads inputs `model` and `consolidate`; writes safetensors shards, their index, and the base's configuration and
tokenizer files. The base's bytes are verified while they are copied, so they are read once. An attempt that was killed
leaves its complete shards to the next one.
"""

from __future__ import annotations

from finetune_trainer.artifacts import new_artifact, open_input, read_manifest
from finetune_trainer.contract import CONSOLIDATE, MERGE, MODEL_INPUT, Report, StageConfig
from finetune_trainer.cpus import available_cpus
from finetune_trainer.merged_model import write_merged_model
from finetune_trainer.merging import DEFAULT_SHARD_BYTES, MergePlan, parse_bytes, parse_precision, plan_merge
from finetune_trainer.model_files import read_model_files
from finetune_trainer.stage import finished_report, keep_report


def run(config: StageConfig) -> Report:
    """Merge; see merging for what is refused and proved."""
    settings = config.spec.get("merge") or {}
    max_shard_bytes = parse_bytes(settings.get("maxShardSize") or DEFAULT_SHARD_BYTES, "spec.merge.maxShardSize")
    dtype = parse_precision(settings.get("precision") or "base", "spec.merge.precision")
    model = open_input(config, MODEL_INPUT, contents=False)
    adapter = open_input(config, CONSOLIDATE)
    digests = {entry.path: entry.sha256 for entry in read_manifest(model).files}
    cpus = available_cpus()
    plan = plan_merge(read_model_files(model), adapter, max_shard_bytes, dtype)
    print(describe_plan(plan, cpus), flush=True)
    with new_artifact(config.output_path, MERGE) as writer:
        result = write_merged_model(plan, writer, config.output_path, digests, cpus)
        metrics = {"tensors": sum(len(shard.tensors) for shard in plan.shards), **result.metrics()}
        keep_report(writer, metrics)
    for proof in result.merged.proofs:
        if proof.changed == 0:
            print(f"warning: {proof.target.tensor} is unchanged, its delta rounds to nothing", flush=True)
    print(
        f"wrote {metrics['bytes']} bytes in {metrics['shards']} shards ({result.reused} of them by an earlier attempt) "
        f"and {result.copied} other files; {metrics['changedValues']} values changed, by at most "
        f"{metrics['maxDifference']}; {metrics['sampledValues']} values read back from the files equal base plus "
        "adapter",
        flush=True,
    )
    return finished_report(config)


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
