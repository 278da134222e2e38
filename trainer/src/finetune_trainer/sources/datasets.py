"""Datasets: which files of a source hold the records that a job asks for.

prepare calls fetch_dataset. The artifact holds the raw files as they are; formats.py and records.py read them. A split
or configuration that cannot be found is an error, never a guess at another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_trainer.errors import UserError
from finetune_trainer.sources.base import Source, SourceFile
from finetune_trainer.sources.store import keep_files

DATASET_KIND = "dataset"
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""File types that records.py reads."""

_SIDE_FILES = frozenset({"dataset_infos.json", "dataset_info.json", "config.json", "state.json", "package.json"})
_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


def fetch_dataset(
    source: Source, *, root: Path, split: str, configuration: str | None, files: str | Sequence[str] | None
) -> Path:
    """The shared artifact of the dataset's files under `root`.

    `files` are glob patterns over paths in the source ("**" crosses folders) and replace `split` and `configuration`.
    UserError (DatasetNotUsable) names what is there when nothing fits.
    """
    listing = source.list_files()
    patterns = [files] if isinstance(files, str) else list(files or [])
    if patterns:
        chosen = _match(source.name, listing.files, patterns, "spec.dataset.files")
    else:
        card = next((file for file in listing.files if file.path == "README.md"), None)
        configs = _card_configs(source.read(card)) if card is not None else []
        chosen = choose_dataset_files(source.name, listing.files, configs, split=split, configuration=configuration)
    metadata = {"source": source.name, "version": listing.version, "files": [file.path for file in chosen]}
    return keep_files(
        source, listing, chosen, root=root, kind=DATASET_KIND, metadata=metadata, check=lambda _folder: None
    )


def choose_dataset_files(
    name: str,
    files: Iterable[SourceFile],
    configs: Sequence[Mapping[str, Any]],
    *,
    split: str,
    configuration: str | None,
) -> list[SourceFile]:
    """The files of one split. `configs` is the list of that name in the dataset card's header, empty without one.

    Without it the split is told by file or folder names ("train-00000-of-00002.parquet", "data/train/x.jsonl"); a
    source whose names tell no split at all is all "train", and so is one that names a file itself.
    """
    files = list(files)
    if configs:
        config = _choose_config(name, configs, configuration)
        patterns = _split_patterns(name, config, split)
        return _match(name, files, patterns, f"the dataset card's configuration {config.get('config_name')!r}")
    if configuration is not None:
        inside = [file for file in files if configuration in PurePosixPath(file.path).parts[:-1]]
        if not inside:
            raise UserError(
                "DatasetNotUsable",
                f"{name} has no configuration {configuration!r}: remove it or set spec.dataset.files",
            )
        files = inside
    records = [file for file in files if _is_record_file(file.path)]
    if not records:
        others = ", ".join(sorted(file.path for file in files)[:5]) or "nothing"
        raise UserError("DatasetNotUsable", f"{name} has no file of type {', '.join(RECORD_SUFFIXES)}; it has {others}")
    splits = {file.path: _split_of(file.path) for file in records}
    chosen = [file for file in records if _is_named(file.path, split)]
    chosen = chosen or [file for file in records if splits[file.path] == split]
    if split == "train" and [file.path for file in files] == [PurePosixPath(name).name]:
        chosen = records
    if not chosen and split == "train" and not any(splits.values()):
        chosen = records
    if not chosen:
        found = ", ".join(sorted({value for value in splits.values() if value})) or "none told by file names"
        raise UserError(
            "DatasetNotUsable",
            f"{name} has no split {split!r} (found: {found}): set spec.dataset.split or spec.dataset.files",
        )
    return _one_type(name, chosen)


def _match(name: str, files: Iterable[SourceFile], patterns: Sequence[str], where: str) -> list[SourceFile]:
    chosen: dict[str, SourceFile] = {}
    files = list(files)
    for pattern in patterns:
        matching = [file for file in files if _is_match(file.path, pattern)]
        if not matching:
            raise UserError("DatasetNotUsable", f"{name}: {where} names {pattern!r}, which fits no file")
        chosen.update((file.path, file) for file in matching)
    wrong = sorted(path for path in chosen if not path.endswith(RECORD_SUFFIXES))
    if wrong:
        raise UserError(
            "DatasetNotUsable", f"{name}: {wrong[0]} is of no type that can be read ({', '.join(RECORD_SUFFIXES)})"
        )
    return [chosen[path] for path in sorted(chosen)]


def _is_match(path: str, pattern: str) -> bool:
    """Glob as hubs read it: "*" stays inside a folder (fnmatch's would not), "**/" is any folders or none."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern)
    return re.fullmatch("".join(_GLOB.get(piece) or _literal_or_class(piece) for piece in pieces), path) is not None


def _literal_or_class(piece: str) -> str:
    if len(piece) < 3 or piece[0] != "[" or piece[-1] != "]":
        return re.escape(piece)
    inside = piece[1:-1].replace("\\", "\\\\").replace("[", "\\[")
    return f"[^{inside[1:]}]" if inside[0] == "!" and len(inside) > 1 else f"[{inside.replace('^', chr(92) + '^')}]"


def _is_record_file(path: str) -> bool:
    return path.endswith(RECORD_SUFFIXES) and PurePosixPath(path).name not in _SIDE_FILES


def _split_of(path: str) -> str:
    """The split that a file's name or, failing that, its nearest folder tells; "" for none."""
    for part in reversed(PurePosixPath(path).parts):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in _SPLITS:
                return "validation" if word in ("valid", "val", "dev") else word
    return ""


def _is_named(path: str, split: str) -> bool:
    """True for a file, a shard of one, or a folder that has just the split's name, such as train_sft."""
    *folders, name = PurePosixPath(path).parts
    stem = re.sub(r"-\d+-of-\d+$", "", name.split(".", 1)[0])
    return split in (*folders, stem)


def _one_type(name: str, files: list[SourceFile]) -> list[SourceFile]:
    """The same records in two types (a converted copy beside the original) must not count twice."""
    suffixes = sorted({PurePosixPath(file.path).suffix for file in files})
    if len(suffixes) > 1:
        raise UserError(
            "DatasetNotUsable", f"{name} has files of types {', '.join(suffixes)}: choose with spec.dataset.files"
        )
    return sorted(files, key=lambda file: file.path)


def _card_configs(card: bytes) -> list[Mapping[str, Any]]:
    """`configs` with data_files in the YAML header of a dataset card; empty when there are none."""
    import yaml

    text = card.decode("utf-8", errors="replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if match is None:
        return []
    try:
        header = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return []  # a card is prose for people; a broken one leaves the choice to the file names
    configs = header.get("configs") if isinstance(header, dict) else None
    if not isinstance(configs, list):
        return []
    return [config for config in configs if isinstance(config, dict) and "data_files" in config]


def _choose_config(name: str, configs: Sequence[Mapping[str, Any]], configuration: str | None) -> Mapping[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    if configuration is not None:
        if configuration not in names:
            raise UserError(
                "DatasetNotUsable", f"{name} has no configuration {configuration!r}: it has {', '.join(names)}"
            )
        return configs[names.index(configuration)]
    for config, config_name in zip(configs, names, strict=True):
        if len(configs) == 1 or config.get("default") is True or config_name == "default":
            return config
    raise UserError("DatasetNotUsable", f"{name}: set spec.dataset.configuration to one of {', '.join(names)}")


def _split_patterns(name: str, config: Mapping[str, Any], split: str) -> list[str]:
    entries = config["data_files"]
    if isinstance(entries, str):
        entries = [{"split": "train", "path": entries}]
    by_split: dict[str, list[str]] = {}
    for entry in entries:
        item = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = item.get("path", [])
        by_split.setdefault(str(item.get("split")), []).extend([paths] if isinstance(paths, str) else paths)
    if split not in by_split:
        raise UserError(
            "DatasetNotUsable",
            f"{name}: configuration {config.get('config_name', 'default')!r} has no split {split!r}: "
            f"it has {', '.join(sorted(by_split))}",
        )
    return by_split[split]
