"""The consolidate stage: the train artifact's sharded checkpoint becomes one adapter that peft loads.

Reads inputs `model` (headers only) and `train`; writes adapter_model.safetensors and adapter_config.json. Needs one CPU
and the memory of a few chunks.
"""

from __future__ import annotations

from finetune_trainer.adapters import read_adapter_config
from finetune_trainer.artifacts import new_artifact, open_input
from finetune_trainer.checkpoints import read_checkpoint
from finetune_trainer.consolidation import describe_targets, find_checkpoint, prove_adapter, write_adapter
from finetune_trainer.contract import CONSOLIDATE, MODEL_INPUT, TRAIN, Report, StageConfig
from finetune_trainer.errors import UserError
from finetune_trainer.model_files import read_model_config, read_model_files
from finetune_trainer.stage import finished_report, keep_report


def run(config: StageConfig) -> Report:
    """Consolidate; CorruptArtifact names the file of a missing, truncated or foreign shard."""
    method = config.spec.get("method") or {}
    if method.get("type", "lora") != "lora":
        raise UserError("MethodNotAvailable", f"method.type {method['type']!r} is not available yet, use lora")
    # The train artifact's manifest covers every shard, so nothing is hashed twice; of the base only headers count here.
    train = open_input(config, TRAIN)
    model = open_input(config, MODEL_INPUT, contents=False)
    checkpoint = read_checkpoint(find_checkpoint(train), contents=False)
    parameters = checkpoint.parameters()
    print(
        f"checkpoint of step {checkpoint.step}: {checkpoint.world_size} shards, {len(parameters)} tensors, "
        "every shard verified, every tensor covered exactly once",
        flush=True,
    )
    adapter_config = read_adapter_config(train)
    match = prove_adapter(checkpoint, adapter_config, read_model_files(model), read_model_config(model))
    with new_artifact(config.output_path, CONSOLIDATE) as writer:
        result = write_adapter(checkpoint, adapter_config, match.targets, writer)
        writer.metadata["targets"] = describe_targets(result.targets)
        writer.metadata["step"] = checkpoint.step
        metrics = {
            "step": checkpoint.step,
            "shards": checkpoint.world_size,
            "tensors": result.tensors,
            "targets": len(result.targets),
            "parameters": result.parameters,
            "bytes": result.nbytes,
        }
        keep_report(writer, metrics)
    print(
        f"wrote an adapter of {result.parameters} parameters in {result.tensors} tensors ({result.nbytes} bytes) "
        f"for {len(result.targets)} modules, each matched with the base model by name and shape",
        flush=True,
    )
    return finished_report(config)
