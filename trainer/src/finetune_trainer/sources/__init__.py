"""Where models and datasets come from: hf://org/name, s3://bucket/prefix, workspace:///path.

prepare calls models.fetch_model and datasets.fetch_dataset; both open their source here. hub.py, s3.py and workspace.py
are the sources, store.py keeps what they bring as artifacts that all jobs on the volume share.
"""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.errors import UserError
from finetune_trainer.sources.base import Source
from finetune_trainer.sources.hub import HubSource
from finetune_trainer.sources.s3 import S3Source
from finetune_trainer.sources.workspace import WorkspaceSource

DEFAULT_REVISION = "main"


def open_source(
    source: str, *, repo_type: str, revision: str | None, token_file: str | None, workspace: Path
) -> Source:
    """The source named by `source`; opens no connection.

    `repo_type` is "model" or "dataset"; `revision` and `token_file` (a mounted secret) are for hubs only. UserError
    when the form is unknown, or a revision is asked of a source that has none.
    """
    revision = revision or DEFAULT_REVISION
    if source.startswith("hf://"):
        return HubSource(source, repo_type=repo_type, revision=revision, token=_read_token(token_file))
    if revision != DEFAULT_REVISION:
        raise UserError(
            "InvalidSource", f"{source} has no revisions, got revision {revision!r}: remove spec's revision"
        )
    if source.startswith("s3://"):
        return S3Source(source)
    if source.startswith("workspace://"):
        return WorkspaceSource(source, workspace=workspace)
    raise UserError(
        "InvalidSource",
        f"unknown source {source!r}: write hf://organisation/name, s3://bucket/prefix or workspace:///path",
    )


def _read_token(token_file: str | None) -> str | None:
    if token_file is None:
        return None
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(
            "SecretMissing", f"cannot read the token at {token_file}: {error.strerror}: check the secret's key"
        ) from error
    if not token:
        raise UserError("SecretMissing", f"the token at {token_file} is empty: check the secret's key")
    return token
