"""hf://org/name: model and dataset repositories of a hub, through huggingface_hub.

The revision is resolved to a commit first and everything is read at that commit. huggingface_hub resumes a cut file;
we check every file's size and hash ourselves, since it quietly falls back to what lies in the folder when the hub
cannot be reached. HF_ENDPOINT chooses the hub; the token comes from a mounted file and is passed in each call, never
stored.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from finetune_trainer.artifacts import hash_file
from finetune_trainer.errors import RetryableError, UserError
from finetune_trainer.sources.base import Listing, SourceFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ATTEMPTS = 5
"""Tries to finish one fetch within one run; each resumes where the last was cut."""
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


class HubSource:
    """One repository at one revision. `repo_type` is "model" or "dataset", `token` None for anonymous access."""

    def __init__(self, source: str, *, repo_type: str, revision: str, token: str | None) -> None:
        self.name = source
        self._repo = source.removeprefix("hf://").strip("/")
        if not _NAME.fullmatch(self._repo):
            raise UserError("InvalidSource", f"{source!r} is no repository of a hub: write hf://organisation/name")
        self._repo_type = repo_type
        self._revision = revision
        self._token = token
        self._commit = revision

    def list_files(self) -> Listing:
        try:
            info = self._api().repo_info(
                self._repo, repo_type=self._repo_type, revision=self._revision, files_metadata=True
            )
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)
        if info.sha is None:
            raise RetryableError("HubUnavailable", f"the hub names no commit for {self._where()}")
        self._commit = info.sha
        files = [
            SourceFile(
                path=sibling.rfilename,
                size=sibling.size or 0,
                identity=str(sibling.blob_id),
                sha256=sibling.lfs.sha256 if sibling.lfs is not None else None,
            )
            for sibling in info.siblings or []
        ]
        return Listing(version=self._commit, files=tuple(sorted(files, key=lambda file: file.path)))

    def read(self, file: SourceFile) -> bytes:
        import requests
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        url = hf_hub_url(
            self._repo, file.path, repo_type=self._repo_type, revision=self._commit, endpoint=self._api().endpoint
        )
        try:
            response = requests.get(url, headers=build_hf_headers(token=self._token or False), timeout=30)
            hf_raise_for_status(response)
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)
        return response.content

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._api().snapshot_download(
                    self._repo,
                    repo_type=self._repo_type,
                    revision=self._commit,
                    local_dir=folder,
                    cache_dir=folder / ".cache" / "hub",
                    allow_patterns=[escape(file.path) for file in files],
                    max_workers=4,
                )
                break
            except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
                if attempt == _ATTEMPTS or not _is_cut(error):
                    self._fail(error)
                print(f"{self.name}: the download was cut ({type(error).__name__}), going on from there", flush=True)
        for file in files:
            self._check(file, folder / file.path)

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        # False means "no token at all".
        return HfApi(endpoint=_endpoint(), token=self._token or False)

    def _check(self, file: SourceFile, path: Path) -> None:
        if not path.is_file():
            raise RetryableError("DownloadIncomplete", f"{file.path} of {self._where()} did not arrive")
        if path.stat().st_size == file.size:
            found, expected = (_git_id(path), file.identity) if file.sha256 is None else (hash_file(path), file.sha256)
            if found == expected:
                return
        path.unlink()
        raise RetryableError(
            "DownloadDamaged",
            f"{file.path} of {self._where()} is not the file that the hub lists ({file.size} bytes, "
            f"{file.sha256 or file.identity}); it was removed and will be fetched again",
        )

    def _where(self) -> str:
        return f"{self._repo_type} {self._repo} at revision {self._revision}"

    def _fail(self, error: Exception) -> NoReturn:
        import requests
        from huggingface_hub import errors

        field = "spec.model" if self._repo_type == "model" else "spec.dataset"
        where = self._where()
        token = "the token given" if self._token else f"no token (set {field}.tokenSecretRef)"
        cause: BaseException | None = error
        while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__  # its text only says that there is no cache either
        if isinstance(cause, errors.GatedRepoError):
            raise UserError(
                "AccessDenied",
                f"{where} is gated and {token} has no access: accept its terms on the hub with the token's account",
            ) from error
        if isinstance(cause, errors.RevisionNotFoundError):
            raise UserError(
                "RevisionNotFound", f"{where}: no such branch, tag or commit: set {field}.revision"
            ) from error
        if isinstance(cause, errors.RepositoryNotFoundError):
            raise UserError(
                "SourceNotFound",
                f"{where} does not exist, or is private and {token} has no access: check {field}.source",
            ) from error
        if isinstance(cause, errors.EntryNotFoundError):
            raise UserError("FileNotFound", f"{where}: {str(cause).strip().splitlines()[-1]}") from error
        if isinstance(cause, errors.HFValidationError):
            raise UserError("InvalidSource", f"{self.name}: {cause}") from error
        if isinstance(cause, requests.HTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status in (401, 403):
                raise UserError(
                    "AccessDenied",
                    f"{where}: the hub refused {token} ({status}): check the secret's value and its rights",
                ) from error
            if 400 <= status < 500 and status not in (408, 425, 429):
                raise UserError("HubRefused", f"{where}: the hub answered {status}: {_unsigned(cause)}") from error
        if isinstance(cause, requests.RequestException) or (_is_cut(error) and cause is not None):
            detail = f"{type(cause).__name__}: {_unsigned(cause)}".splitlines()[0]
            raise RetryableError(
                "HubUnavailable", f"cannot fetch {where} from {self._api().endpoint}: {detail}"
            ) from error
        raise error


def _is_cut(error: Exception) -> bool:
    """True for a transfer that broke on the way and may be resumed."""
    import requests
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, requests.HTTPError):
        status, url = (error.response.status_code, error.response.url) if error.response is not None else (0, "")
        # The signature of an address at the hub's storage runs out during a long download; the next try gets a new one.
        return status >= 500 or (status == 403 and urlsplit(url).netloc != urlsplit(_endpoint()).netloc)
    if isinstance(error, (requests.RequestException, LocalEntryNotFoundError)):
        return True
    return type(error) is OSError and "Consistency check failed" in str(error)


def _unsigned(error: BaseException) -> str:
    """The text of `error` without the queries of addresses: a hub's storage is reached by ones that are signed."""
    return re.sub(r"\?[^\s'\")]+", "?…", str(error))


def _endpoint() -> str:
    """The hub's address. Read at each use: the library reads HF_ENDPOINT only when it is first imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _git_id(path: Path) -> str:
    """git's blob id, by which a hub names the contents of a small file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
