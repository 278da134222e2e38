"""The consolidate stage: the train artifact's sharded checkpoint becomes one adapter that peft loads, or a whole model.

Reads inputs `model` and `train`; the checkpoint is in our own format or in neuronx-distributed's. After lora it writes
adapter_model.safetensors and adapter_config.json and needs the base's headers only; after full it writes what merge
writes: safetensors shards under the base's own names, their index, configuration and tokenizer. Needs one CPU and the
memory of a few chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_trainer.adapters import read_adapter_config
from finetune_trainer.artifacts import ArtifactWriter, new_artifact, open_input
from finetune_trainer.consolidation import (
    Consolidated,
    TrainedParameters,
    describe_targets,
    find_checkpoint,
    match_model,
    open_trained,
    prove_adapter,
    write_adapter,
    write_model,
)
from finetune_trainer.contract import CONSOLIDATE, MODEL_INPUT, TRAIN, Report, StageConfig
from finetune_trainer.merging import DEFAULT_SHARD_BYTES, parse_bytes, parse_precision
from finetune_trainer.model_files import check_unquantized, read_model_config, read_model_files
from finetune_trainer.model_folder import copy_companions, write_index
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.tokenizer_files import carried_digests, check_base_tokenizer


def run(config: StageConfig) -> Report:
    """Consolidate; CorruptArtifact names the file of a missing, truncated or foreign shard."""
    # The train artifact's manifest covers every shard, so nothing is hashed twice; of the base only headers count here.
    train = open_input(config, TRAIN)
    model = open_input(config, MODEL_INPUT, contents=False)
    checkpoint = open_trained(find_checkpoint(train))
    print(
        f"checkpoint of step {checkpoint.step}: {checkpoint.world_size} shards, {len(checkpoint.parameters())} "
        "tensors, every shard verified, every tensor covered exactly once",
        flush=True,
    )
    check_base_tokenizer(train, model)
    is_whole = (config.spec.get("method") or {}).get("type", "lora") == "full"
    with new_artifact(config.output_path, CONSOLIDATE) as writer:
        if is_whole:
            result = _write_model(checkpoint, model, config.spec.get("merge") or {}, writer)
        else:
            result = _write_adapter(checkpoint, model, train, writer)
        writer.metadata["step"] = checkpoint.step
        writer.metadata.update(carried_digests(train))
        metrics = {
            "step": checkpoint.step,
            "shards": checkpoint.world_size,
            "tensors": result.tensors,
            "targets": len(result.targets),
            "parameters": result.parameters,
            "bytes": result.nbytes,
        }
        keep_report(writer, metrics)
    what = "a whole model" if is_whole else f"an adapter for {len(result.targets)} tensors of the base model"
    print(
        f"wrote {what}: {result.parameters} parameters in {result.tensors} tensors ({result.nbytes} bytes), each "
        "matched with the base model by name and shape",
        flush=True,
    )
    return finished_report(config)


def _write_adapter(checkpoint: TrainedParameters, model: Path, train: Path, writer: ArtifactWriter) -> Consolidated:
    adapter_config = read_adapter_config(train)
    match = prove_adapter(checkpoint, adapter_config, read_model_files(model), read_model_config(model))
    result = write_adapter(checkpoint, adapter_config, match.targets, writer)
    writer.metadata["targets"] = describe_targets(result.targets)
    return result


def _write_model(
    checkpoint: TrainedParameters, model: Path, settings: dict[str, Any], writer: ArtifactWriter
) -> Consolidated:
    max_shard_bytes = parse_bytes(settings.get("maxShardSize") or DEFAULT_SHARD_BYTES, "spec.merge.maxShardSize")
    dtype = parse_precision(settings.get("precision") or "base", "spec.merge.precision")
    base, model_config = read_model_files(model), read_model_config(model)
    check_unquantized(model, base.tensors)
    result = write_model(match_model(checkpoint, base, model_config, dtype), base, max_shard_bytes, writer)
    write_index([writer.folder / name for name in result.files], writer, base)
    copy_companions(model, writer, dtype=dtype)
    return result
