"""The name and the labels of every object that the operator makes for a FineTuneJob.

Called by desired.py and observed.py. Names are functions of the job's name, the stage, its digest and the attempt, so
two reconciles, or two operators, that want the same thing also name it alike and the API server refuses the second.
"""

from __future__ import annotations

import hashlib
import re

from finetune_operator.api import constants

MAX_LABEL_LENGTH = 63
"""A DNS label and a label's value: the limit for Services and for the host names of pods."""
MAX_INDEX_DIGITS = 4
"""A pod of an Indexed Job has the host name `<job>-<index>`, which must be a DNS label too."""
MAX_NAME_LENGTH = MAX_LABEL_LENGTH - MAX_INDEX_DIGITS - 1

_NOT_LABEL = re.compile(r"[^a-z0-9-]+")


def child_name(job_name: str, stage: str, digest: str, attempt: int) -> str:
    """`<job>-<stage>-<digest8>-<attempt>`: a DNS label of at most MAX_NAME_LENGTH characters that starts with a letter.

    A job's name that does not fit as it is (too long, or no label that starts with a letter, as a Service needs) is cut
    and gets a hash of the whole name, so that two jobs never share a child's name.
    """
    tail = f"-{stage}-{digest[:8]}-{attempt}"
    return _fit(job_name, MAX_NAME_LENGTH - len(tail)) + tail


def _fit(name: str, room: int) -> str:
    clean = _NOT_LABEL.sub("-", name.lower()).strip("-")
    if clean == name and len(name) <= room and name[:1].isalpha():
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    head = clean if clean[:1].isalpha() else f"j{clean}"
    return f"{head[: room - len(mark) - 1].rstrip('-')}-{mark}"


def pod_host_name(child: str, index: int) -> str:
    """Host name of the pod with that completion index of an Indexed Job."""
    return f"{child}-{index}"


def job_labels(job_name: str, job_uid: str) -> dict[str, str]:
    """Labels of everything that belongs to one FineTuneJob."""
    return {
        constants.LABEL_MANAGED_BY: constants.MANAGED_BY,
        constants.LABEL_JOB_NAME: job_name,
        constants.LABEL_JOB_UID: job_uid,
    }


def attempt_labels(job_name: str, job_uid: str, stage: str, digest: str, attempt: int) -> dict[str, str]:
    """Labels of the objects of one attempt of one stage; by them the operator reads its children back."""
    return {
        **job_labels(job_name, job_uid),
        constants.LABEL_STAGE: stage,
        constants.LABEL_STAGE_DIGEST: digest[:16],
        constants.LABEL_ATTEMPT: str(attempt),
    }


def managed_selector() -> str:
    """Label selector of every child of every FineTuneJob: what the operator watches."""
    return f"{constants.LABEL_MANAGED_BY}={constants.MANAGED_BY},{constants.LABEL_JOB_UID}"


def job_selector(job_uid: str) -> str:
    """Label selector of one FineTuneJob's children."""
    return f"{constants.LABEL_JOB_UID}={job_uid}"
