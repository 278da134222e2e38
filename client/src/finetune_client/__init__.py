"""FineTuneJobs from Python: FineTuneClient, what it returns and what it raises. The commands are in commands.py."""

from finetune_client.client import FineTuneClient
from finetune_client.errors import (
    ClientError,
    ClusterUnreachable,
    Forbidden,
    JobExists,
    JobFailed,
    JobNotFound,
    ManifestError,
    NothingToRetry,
    Refused,
    SpecError,
    WaitTimeout,
)
from finetune_client.job import Job, JobList, JobReport
from finetune_operator.api.finetunejob import FineTuneJobSpec, FineTuneJobStatus

__all__ = [
    "ClientError",
    "ClusterUnreachable",
    "FineTuneClient",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
    "Forbidden",
    "Job",
    "JobExists",
    "JobFailed",
    "JobList",
    "JobNotFound",
    "JobReport",
    "ManifestError",
    "NothingToRetry",
    "Refused",
    "SpecError",
    "WaitTimeout",
]
