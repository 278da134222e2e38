"""`finetune-trainer consolidate-checkpoint CHECKPOINT OUTPUT`: the shards of a Trainium training as one, by hand.

CHECKPOINT is what optimum-neuron 0.1 to 0.4.5 wrote on any number of ranks: a checkpoint-N folder, or one with
adapter_shards/ or shards/ in it. OUTPUT is a new folder in peft's or the hub's layout with a manifest.json beside. It
is the consolidate stage without a job around it: no accelerator, none of the vendor's packages, little memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_trainer.adapters import AdapterTarget, read_adapter_config
from finetune_trainer.artifacts import ArtifactWriter, new_artifact
from finetune_trainer.commands import check_output, run_by_hand
from finetune_trainer.consolidation import (
    Consolidated,
    describe_targets,
    match_model,
    own_tensors,
    prove_adapter,
    write_adapter,
    write_model,
)
from finetune_trainer.contract import CONSOLIDATE, MANIFEST_NAME
from finetune_trainer.errors import UserError
from finetune_trainer.merging import parse_bytes
from finetune_trainer.model_files import CONFIG_NAME, is_companion_file, read_model_config, read_model_files
from finetune_trainer.model_folder import copy_file, write_config, write_index
from finetune_trainer.neuron_checkpoints import NeuronCheckpoint, open_neuron_checkpoint
from finetune_trainer.safetensors_stream import some_names
from finetune_trainer.tokenizer_files import is_tokenizer_file

_GENERATION_CONFIG_NAME = "generation_config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Consolidate as the command line says; returns the exit code, that of the contract where something is wrong."""
    arguments = _parser().parse_args(argv)
    return run_by_hand(
        lambda: run(
            arguments.checkpoint,
            arguments.output,
            arguments.base,
            arguments.max_shard_size,
            first_copies=arguments.first_copies,
        ),
        "stopped; nothing was written",
    )


def run(folder: Path, output: Path, base: Path | None, max_shard_size: str, *, first_copies: bool = False) -> None:
    """Write the checkpoint in `folder` as one adapter or model to `output`.

    With `first_copies` ranks that hold different values of the same tensor are no error: the first one's are taken, and
    the manifest lists those tensors. With `base` names and shapes are held against that model, and what the checkpoint
    lacks beside the weights, such as the tokenizer, is taken from it. Raises what open_neuron_checkpoint raises, and
    UserError when a folder is not what it should be.
    """
    max_shard_bytes = parse_bytes(max_shard_size, "--max-shard-size")
    if base is not None and not base.is_dir():
        raise UserError("NoSuchFolder", f"{base} is no folder: name the base model's folder, downloaded from its hub")
    output = check_output(output, "adapter or model")
    started = time.monotonic()
    checkpoint = open_neuron_checkpoint(folder, contents=True, first_copies=first_copies)
    print(_describe(checkpoint), flush=True)
    with new_artifact(output, CONSOLIDATE) as writer:
        if checkpoint.adapter is None:
            result = _write_model(checkpoint, base, max_shard_bytes, writer)
        else:
            result = _write_adapter(checkpoint, base, writer)
        writer.metadata["step"] = checkpoint.step
        if checkpoint.apart:
            writer.metadata["tensorsApart"] = sorted(checkpoint.apart)
            print(
                f"warning: {len(checkpoint.apart)} tensors differ between ranks, the first rank's are taken: "
                f"{some_names(checkpoint.apart)}",
                file=sys.stderr,
            )
    proof = "not held against a base model (--base MODEL does that)"
    if base is not None:
        proof = f"each matched with {base} by name and shape"
    print(
        f"wrote {result.parameters} parameters in {result.tensors} tensors ({result.nbytes} bytes in "
        f"{len(result.files)} files), {proof}; {time.monotonic() - started:.1f} s, {output}",
        flush=True,
    )


def _describe(checkpoint: NeuronCheckpoint) -> str:
    what = "a full model" if checkpoint.adapter is None else f"the adapter {checkpoint.adapter!r}"
    ignored = f"; {checkpoint.ignored} keys of other pipeline ranks' parameters left out" if checkpoint.ignored else ""
    return (
        f"{checkpoint.path}: {what} on tensor parallel size {checkpoint.tp_size}, pipeline parallel size "
        f"{checkpoint.pp_size}: {len(checkpoint.tensors)} tensors, every file whole, every key accounted for{ignored}"
    )


def _write_adapter(checkpoint: NeuronCheckpoint, base: Path | None, writer: ArtifactWriter) -> Consolidated:
    config = read_adapter_config(checkpoint.config_folder)
    targets: tuple[AdapterTarget, ...] = ()
    if base is not None:
        targets = prove_adapter(checkpoint, config, read_model_files(base), read_model_config(base)).targets
    result = write_adapter(checkpoint, config, targets, writer)
    writer.metadata["targets"] = describe_targets(result.targets)
    for path in _tokenizer(checkpoint, base):
        copy_file(path, writer)
    return result


def _write_model(
    checkpoint: NeuronCheckpoint, base: Path | None, max_shard_bytes: int, writer: ArtifactWriter
) -> Consolidated:
    folder = checkpoint.config_folder
    if base is not None:
        match_model(checkpoint, read_model_files(base), read_model_config(base), None)
        if not (folder / CONFIG_NAME).is_file():
            folder = base
    tensors = own_tensors(checkpoint)
    result = write_model(tensors, None, max_shard_bytes, writer)
    write_index([writer.folder / name for name in result.files], writer)
    dtypes = {tensor.dtype for tensor in tensors}
    write_config(folder, writer, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    copied = {CONFIG_NAME}
    for path in [*_tokenizer(checkpoint, base), folder / _GENERATION_CONFIG_NAME, *_companions(base)]:
        if path.is_file() and path.name not in copied:
            copy_file(path, writer)
            copied.add(path.name)
    return result


def _tokenizer(checkpoint: NeuronCheckpoint, base: Path | None) -> list[Path]:
    """The tokenizer's files, all of one folder: the checkpoint's, or else the base model's."""
    folder = checkpoint.config_folder
    for place in (folder, folder.parent if folder.name.startswith("adapter_") else None, base):
        found = [path for path in sorted(place.iterdir()) if is_tokenizer_file(path.name)] if place else []
        if found:
            return found
    return []


def _companions(base: Path | None) -> Iterator[Path]:
    """What else the base model has beside its weights: licence, code."""
    for path in sorted(base.iterdir()) if base is not None else []:
        is_companion = is_companion_file(path.name) and path.name != MANIFEST_NAME
        if path.is_file() and is_companion and not is_tokenizer_file(path.name):
            yield path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-trainer consolidate-checkpoint",
        description="Turn the shards that optimum-neuron and neuronx-distributed write into one adapter that peft "
        "loads, or one model that transformers loads. Needs no accelerator, none of the vendor's packages and little "
        "memory.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint-N, or a folder with adapter_shards or shards"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new folder for the adapter or model")
    parser.add_argument(
        "--base", type=Path, metavar="MODEL", help="folder of the base model: names and shapes are held against it"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weight file of a model, such as 5GB (default: %(default)s)",
    )
    parser.add_argument(
        "--first-copies",
        action="store_true",
        help="where ranks hold different values of the same tensor, which means that they trained apart, take the "
        "first rank's, as the vendor's own consolidation does, and warn (default: refuse)",
    )
    return parser
