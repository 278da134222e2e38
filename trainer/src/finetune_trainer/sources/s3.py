"""s3://bucket/prefix: objects under a prefix, through boto3.

Credentials come from boto3's own chain (pod identity, IRSA, environment), AWS_ENDPOINT_URL chooses another server. A
file is downloaded under a temporary name, a cut one goes on by range as long as its ETag is the same, and it takes its
name only once size, and MD5 where the ETag is one, agree with the listing. Finished files are kept between runs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune_trainer.errors import RetryableError, UserError
from finetune_trainer.sources.base import Listing, SourceFile
from finetune_trainer.sources.s3_client import as_stage_error, error_code, is_cut, open_client

_ATTEMPTS = 5
"""Tries to finish one file within one run."""
_CHUNK = 1 << 20
_SOURCE = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])/(?P<prefix>.+)")
_MD5 = re.compile(r"[0-9a-f]{32}")


class S3Source:
    """The objects below one prefix, or the single object that the prefix names."""

    def __init__(self, source: str) -> None:
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise UserError("InvalidSource", f"{source!r} is no place in S3: write s3://bucket/prefix")
        self.name = source
        self._bucket = match["bucket"]
        self._prefix = match["prefix"].rstrip("/")
        self._client: Any = None
        self._keys: dict[str, str] = {}

    def list_files(self) -> Listing:
        files = []
        try:
            for page in self._s3().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix):
                for item in page.get("Contents", []):
                    path = self._relative(item["Key"])
                    if path is not None:
                        self._keys[path] = item["Key"]
                        files.append(SourceFile(path, item["Size"], item["ETag"].strip('"')))
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)
        if not files:
            raise UserError("SourceNotFound", f"{self.name} holds no object: check bucket and prefix")
        return Listing(version="", files=tuple(sorted(files, key=lambda file: file.path)))

    def read(self, file: SourceFile) -> bytes:
        try:
            data: bytes = self._s3().get_object(Bucket=self._bucket, Key=self._keys[file.path])["Body"].read()
        except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
            self._fail(error)
        return data

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> None:
        for file in files:
            path = folder / file.path
            if path.is_file() and path.stat().st_size == file.size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            self._download(file, path)

    def _download(self, file: SourceFile, path: Path) -> None:
        part = path.with_name(path.name + ".part")
        part.unlink(missing_ok=True)
        digest = hashlib.md5(usedforsecurity=False)
        answer: dict[str, Any] = {}
        with part.open("wb") as out:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    answer = self._get(file, start=out.tell())
                    for chunk in answer["Body"].iter_chunks(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                    break
                except Exception as error:  # noqa: BLE001 - mapped or raised again, see _fail
                    if attempt == _ATTEMPTS or not is_cut(error):
                        self._fail(error)
                    print(f"{self.name}: {file.path} was cut at byte {out.tell()}, going on from there", flush=True)
            size = out.tell()
            out.flush()
            os.fsync(out.fileno())
        # With SSE-KMS, SSE-C or several parts the ETag is no MD5, and only the size can be compared.
        by_md5 = _MD5.fullmatch(file.identity) and answer.get("ServerSideEncryption", "AES256") == "AES256"
        if size != file.size or (
            by_md5 and "SSECustomerAlgorithm" not in answer and digest.hexdigest() != file.identity
        ):
            part.unlink()
            raise RetryableError(
                "DownloadDamaged",
                f"{self.name}: {file.path} arrived with {size} bytes and MD5 {digest.hexdigest()}, "
                f"the listing says {file.size} bytes and ETag {file.identity}",
            )
        part.rename(path)

    def _get(self, file: SourceFile, *, start: int) -> dict[str, Any]:
        extra = {"Range": f"bytes={start}-"} if start else {}
        answer: dict[str, Any] = self._s3().get_object(
            Bucket=self._bucket, Key=self._keys[file.path], IfMatch=f'"{file.identity}"', **extra
        )
        return answer

    def _relative(self, key: str) -> str | None:
        """The path of `key` below the prefix; None for folder markers and keys that only begin alike."""
        if key == self._prefix:
            return key.rsplit("/", 1)[-1]
        if not key.startswith(self._prefix + "/") or key.endswith("/"):
            return None
        path = key[len(self._prefix) + 1 :]
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise UserError(
                "UnsafePath", f"s3://{self._bucket}/{key}: the key is no plain relative path: rename the object"
            )
        return path

    def _s3(self) -> Any:
        if self._client is None:
            self._client = open_client()
        return self._client

    def _fail(self, error: Exception) -> NoReturn:
        from botocore import exceptions

        code = error_code(error)
        if code in ("NoSuchBucket", "NoSuchKey", "404"):
            raise UserError("SourceNotFound", f"{self.name}: {code}: check bucket and prefix") from error
        if code in ("PreconditionFailed", "412"):
            raise RetryableError("SourceChanged", f"{self.name}: an object changed while it was read") from error
        if isinstance(error, exceptions.ParamValidationError):
            raise UserError("InvalidSource", f"{self.name}: {error}") from error
        known = as_stage_error(error, self.name, f"s3:ListBucket on {self._bucket} and s3:GetObject on its objects")
        if known is not None:
            raise known from error
        raise error
