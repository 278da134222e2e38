"""A FineTuneJob's manifest from a file, a mapping or a typed spec, checked before an API server is asked.

Called by client.py and offline.py. The checks are the operator's own (finetune_operator.api, and underneath
finetune_trainer.spec_checks): all that is wrong is told at once, with field, value and fix.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finetune_client.errors import ManifestError
from finetune_operator.api.constants import API_VERSION, KIND
from finetune_operator.api.finetunejob import FineTuneJobSpec, parse_job

Manifest = dict[str, Any]
Source = str | Path | Mapping[str, Any] | FineTuneJobSpec
"""What a job can be made from: a file, a whole manifest, or a spec for which a name is given."""


def read_manifest(source: Source, *, name: str | None = None) -> Manifest:
    """The manifest of one FineTuneJob, under `name` where that is given. Nothing of its spec is checked.

    ManifestError when a file cannot be read or has not exactly one FineTuneJob, or a spec comes without a name.
    """
    if isinstance(source, FineTuneJobSpec):
        manifest: Manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {}, "spec": source.as_json()}
    elif isinstance(source, Mapping):
        manifest = dict(source)
    else:
        manifest = _only_job(source)
    metadata = dict(manifest.get("metadata") or {})
    if name is not None:
        metadata["name"] = name
    if not metadata.get("name"):
        raise ManifestError("metadata.name is missing; give the job a name, as name= or --name")
    return {**manifest, "metadata": metadata}


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """SpecError with everything that is wrong with name and spec; nothing where all is well."""
    metadata = {key: value for key, value in manifest["metadata"].items() if key in ("name", "namespace")}
    parse_job({**manifest, "metadata": metadata, "status": None})


def _only_job(source: str | Path) -> Manifest:
    where = "standard input" if str(source) == "-" else str(source)
    try:
        text = sys.stdin.read() if str(source) == "-" else Path(source).read_text(encoding="utf-8")
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read {where}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{where} is no YAML: {error}") from error
    jobs = [each for each in documents if isinstance(each, Mapping) and each.get("kind") == KIND]
    if len(jobs) != 1:
        raise ManifestError(f"{where} has {len(jobs)} objects of kind {KIND}; name a file that has one")
    return dict(jobs[0])
