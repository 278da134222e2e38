"""The errors that end a stage on purpose, one class an exit code of the contract.

Every stage and what it calls raise these; stage.py turns them into the report and the exit code. Anything else that
escapes a stage is a bug and keeps its traceback.
"""

from __future__ import annotations

from finetune_trainer.contract import ExitCode


class StageError(Exception):
    """A stage cannot go on. `reason` is a CamelCase word; `message` says what, where, which value, and the remedy."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class UserError(StageError):
    """The spec or the data is wrong; trying again cannot help."""

    exit_code = ExitCode.USER_ERROR


class RetryableError(StageError):
    """Something outside failed: network, a peer, storage."""

    exit_code = ExitCode.RETRYABLE


class HostOutOfMemory(StageError):
    """The process ran out of host memory and lived to say so."""

    exit_code = ExitCode.OUT_OF_HOST_MEMORY


class DeviceOutOfMemory(StageError):
    """An accelerator ran out of its memory."""

    exit_code = ExitCode.OUT_OF_DEVICE_MEMORY


class CorruptArtifact(StageError):
    """An input or a checkpoint is damaged and there is no older one to use instead."""

    exit_code = ExitCode.CORRUPT_ARTIFACT

    def __init__(self, message: str) -> None:
        super().__init__("CorruptArtifact", message)

    def __reduce__(self) -> tuple[type[CorruptArtifact], tuple[str]]:
        # The default passes the formatted text as the only argument, which loses the message between processes.
        return type(self), (self.message,)


class Interrupted(StageError):
    """SIGTERM arrived and a checkpoint was written; the next attempt goes on from it."""

    exit_code = ExitCode.INTERRUPTED
