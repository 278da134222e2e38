"""A stand-in for libneuronxla: what becomes of a graph that a program asks for, in the vendor's words and files.

A fake backend calls run_graph() where torch_xla would cut a graph and hand it over. neuron_parallel_compile beside
this file compiles what was extracted. Graphs are texts here, and "compiling" writes them to model.neff. The cache's
layout and the texts are as finetune_trainer/neuron_cache.py and compilation_log.py describe them, with their sources.
Standard library only, so that it runs in any image.

Environment, beside the vendor's own:

    FAKE_NEURON_FAIL      words, comma-separated: graphs that have one in them cannot be compiled
    FAKE_NEURON_WORDS     what the compiler says of them, in place of FAILURE
    FAKE_NEURON_KILL      the same for graphs whose compiler is killed for memory
    FAKE_NEURON_SECONDS   how long each compilation takes, in seconds
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import time
from pathlib import Path

COMPILER = "neuronxcc-2.21.33363.0+82129205"
HLO = "model.hlo_module.pb"
LOCK = f"{HLO}.lock"
LOCKED_SECONDS = 20.0
"""How long run_graph waits for another's lock: the vendor waits for good, a test must not."""

FAILURE = (
    "2026-01-02T03:04:05Z [NLA001]  Unhandled exception with message: tensor size must be more than 0, input1_set - "
    "Please open a support ticket at https://github.com/aws-neuron/aws-neuron-sdk/issues/new."
)
KILLED = (
    "2026-01-02T03:04:05Z [F137] neuronx-cc was forcibly killed - This most commonly occurs due to insufficient system "
    "memory. Using a smaller data type, dimensions, batch size, or a larger instance type may help."
)


class CompilerError(Exception):
    """neuronx-cc could not compile a graph."""


def say(logger: str, text: str, level: str = "INFO") -> None:
    """One line of the vendor's log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    print(f"{stamp}.000000:  {os.getpid()}  {level} ||{logger}||: {text}", flush=True)


def cache_folder() -> Path:
    """Where the cache is, by the vendor's rule: --cache_dir in NEURON_CC_FLAGS wins over NEURON_COMPILE_CACHE_URL."""
    found = re.search(r"--cache_dir[= ](\S+)", os.environ.get("NEURON_CC_FLAGS", ""))
    return Path(
        found.group(1) if found else os.environ.get("NEURON_COMPILE_CACHE_URL", "/var/tmp/neuron-compile-cache")
    )


def compiler_flags() -> list[str]:
    """The flags that reach the compiler: what only the wrapper reads is no part of a graph's key."""
    own = ("--cache_dir", "--retry_failed_compilation")
    return [word for word in shlex.split(os.environ.get("NEURON_CC_FLAGS", "")) if not word.startswith(own)]


def retries_failures() -> bool:
    return "--retry_failed_compilation" in os.environ.get("NEURON_CC_FLAGS", "").split()


def entry_of(graph: str) -> Path:
    """The graph's folder in the cache."""
    graph_hash = int(hashlib.sha256(graph.encode()).hexdigest()[:15], 16)
    flags_hash = hashlib.sha256(json.dumps(compiler_flags()).encode()).hexdigest()[:8]
    return cache_folder() / COMPILER / f"MODULE_{graph_hash}+{flags_hash}"


def is_done(entry: Path) -> bool:
    return (entry / "model.neff").exists() and (entry / "model.done").exists()


def has_failed(entry: Path) -> bool:
    return (entry / "model.log").exists() and not is_done(entry)


def run_graph(graph: str) -> None:
    """A program asks for this graph. CompilerError where it cannot be compiled, or was not before."""
    entry = entry_of(graph)
    say("NEURON_CACHE", f"Compile cache path: {cache_folder()}")
    if is_done(entry):
        say("NEURON_CC_WRAPPER", f"Using a cached neff at {entry / 'model.neff'}")
        return
    if has_failed(entry) and not retries_failures():
        say("NEURON_CC_WRAPPER", _cached_failure(entry), "ERROR")
        raise CompilerError(_cached_failure(entry))
    entry.mkdir(parents=True, exist_ok=True)
    hlo = entry / HLO
    hlo.write_text(graph)
    (entry / "compile_flags.json").write_text(json.dumps(compiler_flags()))
    if os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1":
        told = f"Extracting graphs ({hlo}) for ahead-of-time parallel compilation. No compilation was done."
        say("NEURON_CC_WRAPPER", told)
        return
    until = time.monotonic() + LOCKED_SECONDS
    while not take_lock(entry):
        if is_done(entry):
            return
        if time.monotonic() > until:
            raise CompilerError(f"Another process must be compiling {entry.name}, been waiting for good")
        say("NEURON_CC_WRAPPER", f"Another process must be compiling {entry.name}, been waiting for: 0.0 minutes")
        time.sleep(0.2)
    try:
        compile_graph(entry)
    finally:
        release_lock(entry)


def _cached_failure(entry: Path) -> str:
    return (
        f"Got a cached failed neff at {entry / 'model.neff'}. Will skip compilation, please set "
        f"--retry_failed_compilation for recompilation: \n {(entry / 'model.log').read_text()}"
    )


def take_lock(entry: Path) -> bool:
    """The lock is a file that exists, whoever made it: a killed process leaves it behind."""
    try:
        os.close(os.open(entry / LOCK, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def release_lock(entry: Path) -> None:
    (entry / LOCK).unlink(missing_ok=True)


def is_named(graph: str, variable: str) -> bool:
    """Whether one of the comma-separated words in a variable is part of the graph."""
    return any(word and word in graph for word in os.environ.get(variable, "").split(","))


def compile_graph(entry: Path) -> None:
    """neuronx-cc on one graph, in the words of the wrapper; CompilerError as the job's environment asks for."""
    graph = (entry / HLO).read_text()
    work = f"/tmp/no-user/neuroncc_compile_workdir/0/model.{entry.name}"
    command = (
        f"neuronx-cc compile --framework=XLA {work}.hlo_module.pb --output {work}.neff {' '.join(compiler_flags())} "
        "--verbose=35"
    )
    say("NEURON_CC_WRAPPER", f"Call compiler with cmd: {command}")
    time.sleep(float(os.environ.get("FAKE_NEURON_SECONDS", "0")))
    print(".....", flush=True)
    failure = os.environ.get("FAKE_NEURON_WORDS", FAILURE)
    for variable, words in (("FAKE_NEURON_FAIL", failure), ("FAKE_NEURON_KILL", KILLED)):
        if is_named(graph, variable):
            told = f"Failed compilation with {command.split()}: {words}"
            (entry / "model.log").write_text(told)
            say("NEURON_CC_WRAPPER", told, "ERROR")
            raise CompilerError(told)
    print("Compiler status PASS", flush=True)
    (entry / "model.log").unlink(missing_ok=True)
    (entry / "model.neff").write_text(f"NEFF {graph}")
    (entry / "model.done").touch()
    say("NEURON_CC_WRAPPER", f"Compilation Successfully Completed for model.{entry.name}.hlo_module.pb")
