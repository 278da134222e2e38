"""Every environment variable of the stages compile and train on Trainium: one table by instance family, with the source
of each value.

The operator puts them on both pods (core/accelerators/neuron.py), which therefore are the same: compiler flags are part
of the key under which a compiled graph is found again. The stages read the cache's folder from here and hold what they
were given to the same rules. Standard library only; nothing is read from the process's own environment.

Deliberately not set. XLA_USE_BF16 and XLA_DOWNCAST_BF16, which the walkthrough's text still names: obsolete, they turn
float32 masters into bf16 behind torch's back (optimum-neuron PR 774), and the model is loaded in bf16 instead.
NEURON_EXTRACT_GRAPHS_ONLY: the compile stage sets it for the program that it traces, never for a pod. GPUS_PER_NODE:
the walkthrough's own command does not read it; the number of processes is in stage.json.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_trainer.neuron_stack import instance_family

CC_FLAGS = "NEURON_CC_FLAGS"
CACHE_URL = "NEURON_COMPILE_CACHE_URL"
CACHE_OPTION = "--cache_dir="

CACHE_PATH_CHARACTERS = "A-Za-z0-9_/-"
"""optimum-neuron reads the option with the pattern --cache_dir=([\\w\\/-]+) and cuts the path at anything else, such as
the dot of llama3.1 (utils/cache_utils.py:215): what it then looks at is another folder than the compiler's."""
_CACHE_PATH = re.compile(rf"/[{CACHE_PATH_CHARACTERS}]+")

_WALKTHROUGH = (
    "awslabs/awsome-distributed-training, 3.test_cases/pytorch/optimum-neuron/llama3/kubernetes/fine-tuning/templates"
)
_SLURM = (
    "awslabs/awsome-distributed-training, 3.test_cases/pytorch/optimum-neuron/llama3/slurm/fine-tuning/"
    "finetune-llama3-8B.sh"
)
_SLURM_2024 = f"{_SLURM.replace('awslabs', 'aws-samples')} at d2d5762"
_NXD_SAMPLE = (
    "awslabs/awsome-distributed-training, 3.test_cases/pytorch/neuronx-distributed/llama3/kubernetes/"
    "llama3_train.yaml-template"
)


@dataclass(frozen=True)
class Variable:
    """One variable with where its value comes from and, in a few words, what it is for."""

    name: str
    value: str
    source: str
    why: str


@dataclass(frozen=True)
class _Family:
    """What is different from one instance family to the next."""

    flags: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()


_FAMILIES: Mapping[str, _Family] = {
    "trn1": _Family(flags=("--target=trn1",)),
    "trn2": _Family(
        variables=(
            Variable(
                "NEURON_LOGICAL_NC_CONFIG",
                "2",
                "Neuron SDK documentation, “Logical NeuronCore configuration”: eight physical cores a device, 2 by "
                "default",
                "the count of cores, four a device, is that of two physical cores each",
            ),
        )
    ),
}
"""Families that are not here have nothing of their own. --target stands where a published script sets it (_SLURM_2024);
without it the compiler, which runs on the node, asks the node."""

_FLAGS = ("--model-type=transformer", "--distribution-strategy=llm-training", "--enable-saturate-infinity")
"""The walkthrough spells the first one with a blank in its Kubernetes templates and with `=` in its Slurm script. With
`=` each option is one word, however the list is split, sorted or compared, and so it stands in the recorded flags of
the public cache of compiled graphs (aws-neuron/optimum-neuron-cache, compile_flags.json of neuronx-cc 2.13 to 2.16)."""


def neuron_variables(instance_type: str, *, cores: int, has_efa: bool, cache_path: str) -> tuple[Variable, ...]:
    """The variables of a compile or train pod that has a node of `instance_type` with `cores` NeuronCores to itself.

    `has_efa`: its nodes talk over Elastic Fabric Adapters; a job on one node needs no network. ValueError as
    check_cache_path.
    """
    check_cache_path(cache_path)
    family = _FAMILIES.get(instance_family(instance_type), _Family())
    flags = " ".join((*_FLAGS, *family.flags, f"{CACHE_OPTION}{cache_path}"))
    always = (
        Variable("NEURON_RT_NUM_CORES", str(cores), _WALKTHROUGH, "all cores of the node, one process each"),
        Variable(CC_FLAGS, flags, f"{_WALKTHROUGH} and {_SLURM_2024} (--target)", "what the graphs are compiled with"),
        Variable(
            CACHE_URL,
            cache_path,
            "Neuron SDK documentation, “neuron_parallel_compile CLI”",
            "the same folder for the tools that do not read --cache_dir, which wins over it",
        ),
        Variable("NEURON_FUSE_SOFTMAX", "1", _WALKTHROUGH, "softmax of eager attention as one operation"),
        Variable(
            "NEURON_RT_STOCHASTIC_ROUNDING_EN",
            "1",
            f"{_WALKTHROUGH}; optimum-neuron 0.4.5, NeuronTrainingArguments.stochastic_rounding_enabled",
            "float32 is rounded to bf16 at random, so that small updates are not lost",
        ),
        Variable(
            "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS",
            "5",
            f"{_WALKTHROUGH} (3 in {_NXD_SAMPLE})",
            "graphs that may wait at the device while the host goes on",
        ),
        Variable("MALLOC_ARENA_MAX", "70", _WALKTHROUGH, "bounds the host memory that threads' arenas hold on to"),
        Variable("OMP_NUM_THREADS", "1", _WALKTHROUGH, "32 processes share the node's CPUs"),
        Variable(
            "HF_HUB_OFFLINE",
            "1",
            "optimum-neuron 0.4.5, utils/hub_cache_utils.py",
            "nothing is asked of the hub's cache of compiled graphs, and nothing is pushed to it",
        ),
    )
    efa = (
        Variable("FI_PROVIDER", "efa", f"{_NXD_SAMPLE}; {_SLURM}", "libfabric's provider"),
        Variable("FI_EFA_USE_DEVICE_RDMA", "1", _NXD_SAMPLE, "device memory is read by the adapter itself"),
        Variable("FI_EFA_FORK_SAFE", "1", _NXD_SAMPLE, "the data loader and the compiler fork"),
        Variable(
            "FI_EFA_USE_HUGE_PAGE",
            "0",
            "libfabric, fi_efa(7); a ClusterQueue of HyperPod covers no hugepages-2Mi",
            "a pod that asked for huge pages would never be admitted, and buffers in them make fork() fail",
        ),
    )
    return (*always, *family.variables, *(efa if has_efa else ()))


def neuron_environment(instance_type: str, *, cores: int, has_efa: bool, cache_path: str) -> dict[str, str]:
    """neuron_variables by name and value."""
    variables = neuron_variables(instance_type, cores=cores, has_efa=has_efa, cache_path=cache_path)
    return {each.name: each.value for each in variables}


def check_cache_path(path: str) -> None:
    """ValueError with the path and what to write instead, where the vendor's tools would read another one."""
    if _CACHE_PATH.fullmatch(path) is None:
        raise ValueError(
            f"the compiler's cache must be an absolute path of {CACHE_PATH_CHARACTERS}, is {path!r}: optimum-neuron "
            f"cuts it at any other character and looks in another folder; use {nearest_cache_path(path)}"
        )


def nearest_cache_path(path: str) -> str:
    """An allowed path near `path`: its other characters become `-`."""
    near = re.sub(rf"[^{CACHE_PATH_CHARACTERS}]+", "-", re.sub(r"^\w+://", "/", path)).strip("-")
    return f"/{near.strip('/')}" if near.strip("/") else "/workspace/neuron-cache"


def cache_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """The cache's folder as each of the two variables names it, by variable; one that names none is left out.

    Of --cache_dir it is the whole value as the compiler reads it, which optimum-neuron may cut.
    """
    found = {}
    for word in _words(environment.get(CC_FLAGS, "")):
        if word.startswith(CACHE_OPTION):
            found[CC_FLAGS] = word.removeprefix(CACHE_OPTION)
    if environment.get(CACHE_URL):
        found[CACHE_URL] = environment[CACHE_URL]
    return found


def with_cache_path(environment: Mapping[str, str], path: str) -> dict[str, str]:
    """`environment` with the cache in another folder, in both variables. ValueError as check_cache_path."""
    check_cache_path(path)
    kept = [word for word in _words(environment.get(CC_FLAGS, "")) if not word.startswith(CACHE_OPTION)]
    flags = " ".join((*map(shlex.quote, kept), f"{CACHE_OPTION}{path}"))
    return {**environment, CC_FLAGS: flags, CACHE_URL: path}


def compiled_with(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide what is compiled, by name: those that compile and train must have in common.

    The cache's folder is not among them: it decides where graphs are kept, not which.
    """
    kept = {}
    for name, value in environment.items():
        if name == CC_FLAGS:
            kept[name] = " ".join(word for word in _words(value) if not word.startswith(CACHE_OPTION))
        elif name.startswith(("NEURON_", "XLA_")) and name not in (CACHE_URL, *_RUNTIME_ONLY):
            kept[name] = value
    return kept


_RUNTIME_ONLY = ("NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "NEURON_RT_LOG_LEVEL", "NEURON_EXTRACT_GRAPHS_ONLY")
"""Read when a graph runs, or what makes the difference between the two stages."""


def _words(flags: str) -> list[str]:
    """The words of NEURON_CC_FLAGS, each option with its value: `--a b` counts as `--a=b`, as the compiler takes it."""
    words: list[str] = []
    for word in shlex.split(flags):
        is_value = not word.startswith("-") and words and words[-1].startswith("--") and "=" not in words[-1]
        if is_value:
            words[-1] = f"{words[-1]}={word}"
        else:
            words.append(word)
    return words
