"""The publish stage: adapter, merged model or both go to S3, with the job's report and model card.

Reads inputs `consolidate`, `merge` where it ran and `evaluate` where it ran. The prefix gets the layout of a model
folder of the hub: the model at its root and the adapter, where both are asked for, in `adapter/`; README.md and
report.html beside them, manifest.json last. s3_upload.py does it and says when a prefix is refused. Credentials are
those of the pod's service account; nothing of them is in the spec. The artifact on the workspace is publication.json,
what S3 has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.adapters import ADAPTER_CONFIG_NAME
from finetune_trainer.artifacts import new_artifact, open_input, read_manifest
from finetune_trainer.contract import (
    CONSOLIDATE,
    CONTRACT_VERSION,
    EVALUATE,
    MERGE,
    PUBLISH,
    ContractError,
    Report,
    StageConfig,
)
from finetune_trainer.errors import UserError
from finetune_trainer.report.reporting import CARD_NAME, PAGE_NAME, render_report
from finetune_trainer.s3_upload import CONTENT_DIGEST, LocalFile, files_of, upload
from finetune_trainer.stage import finished_report, keep_report

PUBLICATION_NAME = "publication.json"
ADAPTER, MODEL, BOTH = "adapter", "model", "both"
ADAPTER_FOLDER = "adapter/"
"""Where the adapter is below the prefix when the whole model is at its root."""


@dataclass(frozen=True)
class Args:
    """spec.publish.s3: where to, and what of the result."""

    uri: str
    contents: str | None


def parse_args(config: StageConfig) -> Args:
    """Args of stage.json; ContractError names the field that is wrong."""
    s3 = (config.spec.get("publish") or {}).get("s3")
    if not isinstance(s3, Mapping) or not isinstance(s3.get("uri"), str):
        raise ContractError(f"stage.json: spec.publish.s3.uri must be a string, got {s3!r}")
    contents = s3.get("contents")
    if contents not in (None, ADAPTER, MODEL, BOTH):
        raise ContractError(f"stage.json: spec.publish.s3.contents is {contents!r}, expected adapter, model or both")
    return Args(s3["uri"], contents)


def run(config: StageConfig) -> Report:
    """Publish; see s3_upload.upload for what is refused and what is tried again."""
    args = parse_args(config)
    content, contents = _content(config, args.contents)
    sources = {
        name: ref.digest for name, ref in sorted(config.inputs.items()) if name in (CONSOLIDATE, MERGE, EVALUATE)
    }
    total = sum(file.size for file in content)
    print(f"publishing {contents}: {len(content)} files of {total} bytes to {args.uri}", flush=True)
    with new_artifact(config.output_path, PUBLISH) as writer:
        described_by = []
        for name, data in render_report(config).items():
            writer.write(name, data)
            described_by.append(LocalFile(name, writer.folder / name, len(data), hashlib.sha256(data).hexdigest()))
        facts = {
            "contractVersion": CONTRACT_VERSION,
            "kind": "published-model",
            "contents": contents,
            "sources": sources,
            "job": {name: config.job[name] for name in ("namespace", "name") if name in config.job},
        }
        done = upload(args.uri, content, described_by, facts)
        publication = {"uri": args.uri, "manifest": done.manifest}
        writer.write(PUBLICATION_NAME, (json.dumps(publication, indent=2, sort_keys=True) + "\n").encode())
        metrics: dict[str, Any] = {
            "uri": args.uri,
            "contents": contents,
            "files": len(done.manifest["files"]),
            "bytes": sum(entry["size"] for entry in done.manifest["files"]),
            CONTENT_DIGEST: done.manifest[CONTENT_DIGEST],
        }
        keep_report(writer, metrics)
    what = (
        "was complete with this very content already" if done.reused else f"is complete, {done.sent_bytes} bytes sent"
    )
    message = f"{args.uri} {what}; {metrics['files']} files of {metrics['bytes']} bytes are verified."
    print(message, flush=True)
    return dataclasses.replace(finished_report(config, {"sentBytes": done.sent_bytes}), message=message)


def _content(config: StageConfig, asked: str | None) -> tuple[list[LocalFile], str]:
    """The files of the result by their names below the prefix, and which result that is."""
    # Every file is hashed again while it is read for the upload.
    result = open_input(config, CONSOLIDATE, contents=False)
    is_adapter = (result / ADAPTER_CONFIG_NAME).is_file()
    adapter = result if is_adapter else None
    model = open_input(config, MERGE, contents=False) if MERGE in config.inputs else None if is_adapter else result
    contents = asked or (ADAPTER if model is None else MODEL)
    if contents in (MODEL, BOTH) and model is None:
        raise UserError(
            "NothingToPublish",
            f"publish.s3.contents is {contents} and the job has no whole model: set merge.enabled: true, or adapter",
        )
    if contents in (ADAPTER, BOTH) and adapter is None:
        raise UserError(
            "NothingToPublish",
            f"publish.s3.contents is {contents} and full fine-tuning leaves no adapter: set it to model",
        )
    files: list[LocalFile] = []
    if contents != ADAPTER and model is not None:
        files += _model_files(model)
    if contents != MODEL and adapter is not None:
        files += _model_files(adapter, ADAPTER_FOLDER if contents == BOTH else "")
    return files, contents


def _model_files(folder: Path, below: str = "") -> list[LocalFile]:
    """The artifact's files but a card of its own: the job's says what this model is."""
    entries = [entry for entry in read_manifest(folder).files if entry.path not in (CARD_NAME, PAGE_NAME)]
    return list(files_of(folder, entries, below))
