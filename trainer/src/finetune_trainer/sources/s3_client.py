"""One client for S3, and what its errors mean for a stage; sources/s3.py reads with it, s3_upload.py writes.

Endpoint, region and credentials come from boto3's own chain: the pod's service account (pod identity, IRSA) or the
environment, never from a spec. botocore tries again what is worth it (throttling, 5xx, cut connections), with
exponential backoff and jitter; what is left after that is mapped here. boto3 is imported when a client is opened.
"""

from __future__ import annotations

import os
from typing import Any

from finetune_trainer.errors import RetryableError, StageError, UserError

UPLOAD_ATTEMPTS = 8
"""Tries of one request of an upload, the first included, where AWS_MAX_ATTEMPTS does not say another number."""


def open_client(*, attempts: int | None = None) -> Any:
    """A new S3 client; `attempts` is botocore's number of tries a request, its own default where None."""
    import boto3
    from botocore.config import Config

    config = None
    if attempts is not None:
        most = int(os.environ.get("AWS_MAX_ATTEMPTS") or attempts)
        config = Config(
            retries={"mode": "standard", "total_max_attempts": most},
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
        )
    # a session of its own: boto3's default one keeps credentials that were replaced since
    return boto3.Session().client("s3", region_name=os.environ.get("AWS_REGION") or _default_region(), config=config)


def error_code(error: Exception) -> str | None:
    """The code of S3's own answer, such as NoSuchKey or 404; None where it did not answer."""
    from botocore import exceptions

    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, exceptions.ClientError) else None


def as_stage_error(error: Exception, name: str, needs: str) -> StageError | None:
    """The StageError that `error` amounts to, None for one of our own disk or a bug.

    `name` is the place in S3, `needs` the rights that the stage's service account must have for it.
    """
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code = error_code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (401, 403):
            return UserError(
                "AccessDenied",
                f"{name}: S3 refused these credentials ({code}): the stage's service account needs {needs}",
            )
        if 400 <= status < 500 and status not in (408, 429):
            return UserError("S3Refused", f"{name}: S3 answered {status} {code}: {error}")
        return RetryableError("S3Unavailable", f"{name}: S3 answered {status} {code}")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return UserError("NoCredentials", f"{name}: {error}: give the stage a service account with a role for S3")
    if isinstance(error, (exceptions.BotoCoreError, OSError)) and not _is_local(error):
        return RetryableError("S3Unavailable", f"{name}: {type(error).__name__}: {error}")
    return None


def is_cut(error: Exception) -> bool:
    """True where the connection broke, rather than that the server answered."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    # a ClientError is the server's answer, so nothing was cut
    return isinstance(error, (exceptions.HTTPClientError, exceptions.IncompleteReadError, HTTPError, ConnectionError))


def _is_local(error: Exception) -> bool:
    """True for an error of our own disk."""
    return isinstance(error, OSError) and error.filename is not None


def _default_region() -> str | None:
    # S3 needs some region to sign with; an explicit AWS_DEFAULT_REGION or profile is boto3's to find
    return None if os.environ.get("AWS_DEFAULT_REGION") else "us-east-1"
