"""What can go wrong between a user and a FineTuneJob, each with its remedy, and the exit code that scripts see.

Raised by cluster.py, client.py and manifests.py; commands.py ends with exit_code_of(error). A spec that is wrong is the
operator's own SpecError, which names every field, its value and the fix.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from finetune_operator.api.problems import SpecError

if TYPE_CHECKING:
    from finetune_client.job import Job

__all__ = [
    "ClientError",
    "ClusterUnreachable",
    "Exit",
    "Forbidden",
    "JobExists",
    "JobFailed",
    "JobNotFound",
    "ManifestError",
    "NothingToRetry",
    "Refused",
    "SpecError",
    "WaitTimeout",
    "exit_code_of",
]


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    JOB_FAILED = 1
    USAGE = 2
    CLUSTER = 3
    TIMEOUT = 4
    INTERRUPTED = 130


class ClientError(Exception):
    """Anything that a caller can act on; its text has the remedy."""

    exit_code = Exit.USAGE


class ManifestError(ClientError):
    """A file that holds no FineTuneJob."""


class JobNotFound(ClientError):
    """No FineTuneJob of that name."""


class JobExists(ClientError):
    """The name is taken."""


class NothingToRetry(ClientError):
    """The job has not failed, or what failed cannot be run again as it is."""


class Refused(ClientError):
    """The API server refused what was asked: its words."""


class ClusterUnreachable(ClientError):
    """No kubeconfig, no such context, no answer, or no FineTuneJobs in that cluster."""

    exit_code = Exit.CLUSTER


class Forbidden(ClientError):
    """The user's own rights do not allow it."""

    exit_code = Exit.CLUSTER


class WaitTimeout(ClientError):
    """What was waited for did not come in time; the job goes on."""

    exit_code = Exit.TIMEOUT


class JobFailed(ClientError):
    """The job came to its end without its result. `job` is how it stands."""

    exit_code = Exit.JOB_FAILED

    def __init__(self, message: str, job: Job) -> None:
        self.job = job
        super().__init__(message)


def exit_code_of(error: Exception) -> int:
    """The exit code of a command that ends with this error."""
    return int(error.exit_code if isinstance(error, ClientError) else Exit.USAGE)
