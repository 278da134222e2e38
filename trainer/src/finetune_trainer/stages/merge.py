"""The merge stage: base model and adapter become one model folder that transformers loads as it is.

Reads inputs `model` and `consolidate`; writes safetensors shards, their index, and the base's configuration and
tokenizer files. The base's bytes are verified while they are copied, so they are read once. An attempt that was killed
leaves its complete shards to the next one.
"""

from __future__ import annotations

from finetune_trainer.artifacts import new_artifact, open_input, read_manifest
from finetune_trainer.contract import CONSOLIDATE, MERGE, MODEL_INPUT, Report, StageConfig
from finetune_trainer.cpus import available_cpus
from finetune_trainer.merged_model import describe_merge, describe_plan, write_merged_model
from finetune_trainer.merging import DEFAULT_SHARD_BYTES, parse_bytes, parse_precision, plan_merge
from finetune_trainer.model_files import read_model_files
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.tokenizer_files import carried_digests, check_base_tokenizer


def run(config: StageConfig) -> Report:
    """Merge; see merging for what is refused and proved."""
    settings = config.spec.get("merge") or {}
    max_shard_bytes = parse_bytes(settings.get("maxShardSize") or DEFAULT_SHARD_BYTES, "spec.merge.maxShardSize")
    dtype = parse_precision(settings.get("precision") or "base", "spec.merge.precision")
    model = open_input(config, MODEL_INPUT, contents=False)
    adapter = open_input(config, CONSOLIDATE)
    check_base_tokenizer(adapter, model)
    digests = {entry.path: entry.sha256 for entry in read_manifest(model).files}
    cpus = available_cpus()
    plan = plan_merge(read_model_files(model), adapter, max_shard_bytes, dtype)
    print(describe_plan(plan, cpus), flush=True)
    with new_artifact(config.output_path, MERGE) as writer:
        result = write_merged_model(plan, writer, config.output_path, digests, cpus)
        metrics = {"tensors": sum(len(shard.tensors) for shard in plan.shards), **result.metrics()}
        writer.metadata.update(carried_digests(adapter))
        keep_report(writer, metrics)
    print(describe_merge(result), flush=True)
    return finished_report(config)
