"""Base models: which files of a source make one, and whether they do.

prepare calls fetch_model. The artifact is a folder in the hub's layout: config.json, safetensors weights, tokenizer and
generation config, licence texts. Weights are never loaded here, and pickled ones are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from finetune_trainer.artifacts import read_tensor_header
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.model_files import read_json_object, read_weight_map
from finetune_trainer.sources.base import Source, SourceFile
from finetune_trainer.sources.store import keep_files

MODEL_KIND = "model"
WEIGHTS_INDEX = "model.safetensors.index.json"

_STANDARD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_OTHER_WEIGHTS = re.compile(r"[^/]+\.safetensors")
_PICKLED = re.compile(r"[^/]+\.(bin|pt|pth|ckpt|pkl|h5|msgpack)")
_SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json|special_tokens_map\.json|added_tokens\.json"
    r"|tokenizer[^/]*\.(json|model)|vocab\.(json|txt)|merges\.txt|[^/]+\.(spm|tiktoken)|spiece\.model|chat_template\.(json|jinja)"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)[^/]*"
)
_CODE = re.compile(r"[^/]+\.py")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def fetch_model(source: Source, *, root: Path, trust_remote_code: bool) -> Path:
    """The shared artifact of the model at `source` under `root`; its *.py files only with `trust_remote_code`.

    UserError (ModelNotUsable) when the source lacks config, tokenizer or safetensors weights, or a file is broken.
    """
    listing = source.list_files()
    files = choose_model_files(source.name, listing.files, trust_remote_code=trust_remote_code)
    metadata = {"source": source.name, "version": listing.version}
    return keep_files(
        source,
        listing,
        files,
        root=root,
        kind=MODEL_KIND,
        metadata=metadata,
        check=lambda folder: check_model(source.name, folder),
    )


def fetch_tokenizer(source: Source, folder: Path, *, trust_remote_code: bool) -> None:
    """Bring what the model at `source` has beside its weights into `folder`; UserError when it has no tokenizer."""
    files = choose_model_files(source.name, source.list_files().files, trust_remote_code=trust_remote_code)
    source.fetch([file for file in files if not file.path.endswith((".safetensors", ".index.json"))], folder)


def choose_model_files(name: str, files: Iterable[SourceFile], *, trust_remote_code: bool) -> list[SourceFile]:
    """The files of `files` that make a model in the hub's layout. Other copies of the weights stay out."""
    files = list(files)
    paths = {file.path for file in files}
    if "config.json" not in paths:
        hint = "it is an adapter, give its base model" if "adapter_config.json" in paths else "check the source's path"
        raise UserError("ModelNotUsable", f"{name} has no config.json at its top: {hint}")
    weights = [file for file in files if _STANDARD_WEIGHTS.fullmatch(file.path)]
    weights = weights or [file for file in files if _OTHER_WEIGHTS.fullmatch(file.path)]
    if not weights:
        pickled = sorted(path for path in paths if _PICKLED.fullmatch(path))
        if pickled:
            raise UserError(
                "ModelNotUsable",
                f"{name} has pickled weights only ({pickled[0]}), which can run code when they are loaded: "
                "convert them to safetensors, or name a revision that has them",
            )
        raise UserError("ModelNotUsable", f"{name} has no *.safetensors weights at its top")
    if not paths.intersection(_TOKENIZER):
        raise UserError(
            "ModelNotUsable", f"{name} has no tokenizer: one of {', '.join(_TOKENIZER)} must be beside the weights"
        )
    chosen = [file for file in files if _SIDE_FILES.fullmatch(file.path)]
    if trust_remote_code:
        chosen += [file for file in files if _CODE.fullmatch(file.path)]
    return sorted({*weights, *chosen}, key=lambda file: file.path)


def check_model(name: str, folder: Path) -> None:
    """UserError when config or index is no JSON, a shard that the index names is missing, or a weights file is cut."""
    _check_object(name, folder / "config.json")
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            weight_map = read_weight_map(index)
        except CorruptArtifact as error:
            raise _unusable(name, index, error) from error
        missing = sorted({shard for shard in weight_map.values() if not (folder / shard).is_file()})
        if missing:
            raise UserError("ModelNotUsable", f"{name}: {WEIGHTS_INDEX} names {missing[0]}, which is not there")
    for shard in sorted(folder.glob("*.safetensors")):
        try:
            read_tensor_header(shard)
        except CorruptArtifact as error:
            raise _unusable(name, shard, error) from error


def _check_object(name: str, path: Path) -> None:
    try:
        read_json_object(path, "a model folder needs it beside its weights")
    except CorruptArtifact as error:
        raise _unusable(name, path, error) from error


def _unusable(name: str, path: Path, error: CorruptArtifact) -> UserError:
    """The error in terms of the source, which has no folder of ours."""
    return UserError("ModelNotUsable", f"{name}: {error.message.replace(str(path), path.name)}")
