"""What backends on torch.distributed share: the process group, talk between the ranks, and what their errors mean.

backends/torch.py and backends/neuron.py inherit from it. Nothing here knows a model or a device.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer.backends import Channel
from finetune_trainer.collective_watch import CollectiveWatch
from finetune_trainer.contract import COLLECTIVE_TIMEOUT_ENV
from finetune_trainer.errors import DeviceOutOfMemory, HostOutOfMemory, RetryableError, StageError, UserError

COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""So long a rank waits for its peers in a collective, unless contract.COLLECTIVE_TIMEOUT_ENV says otherwise. A killed
process is noticed at once: its sockets close."""
WRITING_TIMEOUT = timedelta(hours=2)
"""The same between the threads that write checkpoints: one rank's file may take that much longer than another's."""

_HOST_MEMORY_WORDS = ("DefaultCPUAllocator", "Cannot allocate memory")
_RAISE_LIMIT = "raise stages.train.resources.limits.memory"
_PEER_WORDS = re.compile(
    r"Connection (closed|reset)|connection closed|Broken pipe|Timed out|timed out|timeout|Gloo|gloo|NCCL|"
    r"No route to host|Connection refused|connect"
)


class TorchRanks:
    """One rank among others, by torchrun's environment: rank and world size, process group, channels, errors.

    `stuck` is told of a collective that waits in vain, in a thread of its own, and must end the process.
    """

    device_memory_words: tuple[str, ...] = ()
    """What an error of the device's library says when its memory has run out, where that is no class of torch's."""

    def __init__(self, stuck: Callable[[StageError], None] | None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._peers: list[str] = []
        self._stuck = stuck
        self._watch: CollectiveWatch | None = None
        self._channel = ObjectChannel(self.rank, self.world_size, self._collective, "")
        self.writers: Channel = self._channel

    def stop(self) -> None:
        if dist.is_initialized():
            with self._collective("leaving the process group"):
                dist.barrier()
            if self._watch:
                self._watch.close()
            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        return self._channel.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        return self._channel.gather(value)

    def _meet(self, store: Any) -> None:
        """Learn the hosts of the others, and look after collectives from now on. All ranks, in the process group."""
        self._peers = self.gather(socket.gethostname())
        if self._stuck:
            board = StoreBoard(dist.PrefixStore("waiting", store.clone()), self.world_size)  # type: ignore[attr-defined]
            self._watch = CollectiveWatch(self.rank, self._peers, board, collective_timeout(), self._stuck)
            self._watch.start()

    @contextmanager
    def _collective(self, doing: str) -> Iterator[None]:
        """What waits for other ranks, in the main thread: guarded, and looked after where there are any."""
        with self._guard(doing), self._watch.section(doing) if self._watch else nullcontext():
            yield

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn the errors that torch has for memory and peers into ours; others pass."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._out_of_device_memory(doing, error) from error
        except MemoryError as error:
            raise HostOutOfMemory("OutOfHostMemory", f"{first_line(error)} during {doing}: {_RAISE_LIMIT}") from error
        except RuntimeError as error:
            text = str(error)
            if any(word in text for word in self.device_memory_words):
                raise self._out_of_device_memory(doing, error) from error
            if any(word in text for word in _HOST_MEMORY_WORDS):
                raise HostOutOfMemory(
                    "OutOfHostMemory", f"{first_line(error)} during {doing}: {_RAISE_LIMIT}"
                ) from error
            if isinstance(error, dist.DistError) or _PEER_WORDS.search(text):
                raise RetryableError("PeerLost", self._peer_message(doing, text)) from error
            raise

    def _out_of_device_memory(self, doing: str, error: Exception) -> DeviceOutOfMemory:
        return DeviceOutOfMemory(
            "OutOfDeviceMemory",
            f"{first_line(error)} during {doing}: lower training.microBatchSize and raise "
            "gradientAccumulationSteps as much, lower dataset.maxLength, or set training.gradientCheckpointing",
        )

    def _peer_message(self, doing: str, text: str) -> str:
        others = [f"rank {rank} ({host})" for rank, host in enumerate(self._peers) if rank != self.rank]
        known = ", ".join(others) if others else "another rank"
        return (
            f"rank {self.rank} of {self.world_size} lost {known} during {doing} ({first_line(text)[:200]}): "
            "look at the other pods for the cause; the next attempt goes on from the last checkpoint"
        )


@dataclass(frozen=True)
class StoreBoard:
    """See collective_watch.Board: notes in a store that the process groups do not use, so that neither waits here."""

    store: Any  # torch.distributed.Store
    world_size: int

    def put(self, rank: int, note: str) -> None:
        self.store.set(str(rank), note)

    def notes(self) -> list[str | None]:
        keys = [str(rank) for rank in range(self.world_size)]
        return [self.store.get(key).decode() if self.store.check([key]) else None for key in keys]


@dataclass(frozen=True)
class ObjectChannel:
    """See backends.Channel: objects between the ranks over one process group, of which one thread makes use."""

    rank: int
    world_size: int
    guard: Callable[[str], AbstractContextManager[None]]
    purpose: str
    group: Any = None

    def broadcast(self, value: Any) -> Any:
        if self.world_size == 1:
            return value
        box = [value]
        with self.guard(f"a broadcast{self.purpose}"):
            dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with self.guard(f"a gather{self.purpose}"):
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def collective_timeout() -> float:
    """Seconds; UserError when the environment has no positive number there."""
    text = os.environ.get(COLLECTIVE_TIMEOUT_ENV, "")
    try:
        seconds = float(text) if text else COLLECTIVE_TIMEOUT_SECONDS
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError("InvalidTraining", f"{COLLECTIVE_TIMEOUT_ENV} is {text!r}: give a positive number of seconds")
    return seconds
