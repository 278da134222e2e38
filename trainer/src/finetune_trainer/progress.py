"""Tells people and the operator how far training is: one line on stdout, one POST to the operator's endpoint.

The training loop tells of every step, since a training that posts and does not advance is taken for one that hangs.
Posting is best effort from its own thread: the newest facts wait in a mailbox of one place, at most one request goes
out in MIN_INTERVAL_SECONDS, and whatever fails is dropped. Nothing here ever blocks or stops training. Standard library
only.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from finetune_trainer.throughput import Speed

MIN_INTERVAL_SECONDS = 2.0
MAX_INTERVAL_SECONDS = 60.0
"""Between two requests after repeated failures; each failure doubles the pause up to this."""
REQUEST_TIMEOUT_SECONDS = 5.0


class ProgressPoster:
    """Posts the newest facts to config.progress: {"url", "tokenPath", "caPath"}; without a url it does nothing.

    The token file is read for every request, because the kubelet replaces it. It is sent over https only.
    """

    def __init__(self, target: Mapping[str, str], min_interval: float = MIN_INTERVAL_SECONDS) -> None:
        self._target = dict(target)
        self._min_interval = min_interval
        self._mailbox: bytes | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if self._target.get("url"):
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def post(self, facts: Mapping[str, Any]) -> None:
        """Put `facts` into the mailbox, over what waits there. Returns at once."""
        if self._thread is None:
            return
        body = json.dumps(facts, allow_nan=False).encode()
        with self._changed:
            self._mailbox = body
            self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Send what still waits, for at most `timeout` seconds; afterwards nothing is sent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        pause = self._min_interval
        said = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._mailbox is not None or self._closing)
                body, self._mailbox = self._mailbox, None
            if body is None:
                return
            try:
                self._send(body)
                pause = self._min_interval
            except (OSError, http.client.HTTPException, ValueError) as error:
                pause = min(pause * 2, MAX_INTERVAL_SECONDS)
                if not said:
                    said = True
                    print(f"progress does not reach the operator ({error}); training goes on without it", flush=True)
            with self._changed:
                # Closing ends the pause early: what was posted last goes out at once.
                self._changed.wait_for(lambda: self._closing, timeout=pause)

    def _send(self, body: bytes) -> None:
        url = urlsplit(self._target["url"])
        headers = {"Content-Type": "application/json"}
        if url.scheme == "https":
            headers["Authorization"] = f"Bearer {Path(self._target['tokenPath']).read_text().strip()}"
        connection = self._connect(url)
        try:
            connection.request("POST", url.path or "/", body=body, headers=headers)
            response = connection.getresponse()
            response.read()
            # http.client follows no redirect, so the token goes to the operator or nowhere.
            if response.status >= 300:
                raise OSError(f"POST {self._target['url']}: {response.status} {response.reason}")
        finally:
            connection.close()

    def _connect(self, url: SplitResult) -> http.client.HTTPConnection:
        host = url.hostname or ""
        if url.scheme == "https":
            context = ssl.create_default_context(cafile=self._target.get("caPath") or None)
            return http.client.HTTPSConnection(host, url.port, timeout=REQUEST_TIMEOUT_SECONDS, context=context)
        return http.client.HTTPConnection(host, url.port, timeout=REQUEST_TIMEOUT_SECONDS)


class Progress:
    """What one training process (rank 0) says about its progress. `total_steps` counts from the job's beginning."""

    def __init__(self, poster: ProgressPoster, total_steps: int) -> None:
        self._poster = poster
        self._total = total_steps
        self._facts: dict[str, Any] = {"totalSteps": total_steps}

    def started(self, step: int) -> None:
        """Training begins after `step` finished steps, which are those of a checkpoint unless there are none."""
        if step:
            self._facts["lastCheckpoint"] = step
        self._post(step=step)

    def stepped(self, step: int) -> None:
        """`step` steps are done. Prints nothing: called for each step, of which few are logged."""
        self._post(step=step)

    def saving(self, step: int) -> None:
        """The checkpoint of `step` is being written, which may take longer than many steps."""
        self._post(step=step, phase="saving")

    def evaluating(self, step: int) -> None:
        """The held-out loss after `step` is being measured, which may take longer than many steps."""
        self._post(step=step, phase="evaluating")

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """A line of the held-out loss was written to training.jsonl."""
        print(f"step {line['step']}/{self._total}  held-out loss {line['validationLoss']:.4f}", flush=True)
        self._post(validationLoss=line["validationLoss"])

    def logged(self, line: Mapping[str, Any], speed: Speed, seconds_left: float) -> None:
        """A line of training.jsonl was written: its steps are done, at this speed since the line before."""
        eta = (
            time.strftime("%H:%M:%S", time.gmtime(seconds_left))
            if seconds_left < 86400
            else f"{seconds_left / 3600:.0f} h"
        )
        utilisation = "" if speed.mfu is None else f"  MFU {100 * speed.mfu:.1f} %"
        print(
            f"step {line['step']}/{self._total}  loss {line['loss']:.4f}  lr {line['learningRate']:.3g}  "
            f"norm {line['gradientNorm']:.3g}  {speed.tokens_per_second:.0f} tokens/s{utilisation}  {eta} left",
            flush=True,
        )
        facts: dict[str, Any] = {name: line[name] for name in ("step", "loss", "learningRate", "gradientNorm")}
        facts.update(speed.as_json(), secondsLeft=round(seconds_left))
        self._post(**facts)

    def saved(self, step: int, seconds: float) -> None:
        """The checkpoint of `step` is complete after `seconds`; training may be further by then."""
        print(f"checkpoint of step {step} written in {seconds:.2f} s", flush=True)
        self._post(lastCheckpoint=step)

    def close(self) -> None:
        self._poster.close()

    def _post(self, phase: str | None = None, **facts: Any) -> None:
        """Post all that is known. `phase` is what goes on between steps, None while there is none."""
        self._facts.pop("phase", None)
        self._facts.update(facts if phase is None else {**facts, "phase": phase})
        self._poster.post(self._facts)
