"""What the vendor's stack cannot train, refused before a chip is rented: one set of checks of model, split and adapter.

Called by the operator's preflight (core/preflight.py), which knows a model by its table or by prepare's report and the
node by its instance type, and by neuron_checks.py at the start of the stages compile and train, which have stage.json
and the model's config.json. What the spec alone decides is in spec_rules.py, so that the API server refuses it; the
memory of a core is core/memory.py's. Standard library only, and no I/O.

Each message has the numbers and the nearest valid fix. Where a rule was found by running or reading the vendor's code
(optimum-neuron 0.4.5, neuronx-distributed 0.15), its comment says in which file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_trainer.neuron_environment import cache_paths, check_cache_path
from finetune_trainer.neuron_stack import STACKS, find_stack, instance_family, sound_types
from finetune_trainer.spec_checks import Problem
from finetune_trainer.spec_rules import ALL_LINEAR, MAX_SPLIT, NEURON_LINEAR, nearest_sizes

MODEL_TYPES: Mapping[str, bool] = {"llama": True, "qwen3": True, "granite": False}
"""Model types that the vendor trains, by config.json's model_type, and whether with pipeline parallelism
(models/training/auto_models.py; SUPPORTS_PIPELINE_PARALLELISM of each class)."""

_QKV = ("q_proj", "k_proj", "v_proj")
_APART = 4
"""The tensor parallel size at which trn1's groups of ranks are not neighbours."""

_TP, _PP = "spec.parallelism.tensorParallelSize", "spec.parallelism.pipelineParallelSize"


@dataclass(frozen=True)
class NeuronModel:
    """What of a model decides how it can be split. `model_type` is config.json's, "" where it is not known.

    `tied`: embedding and output layer are one matrix. `biased`: attention or MLP layers have biases.
    """

    model_type: str
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    layers: int
    tied: bool = False
    biased: bool = False


@dataclass(frozen=True)
class NeuronNode:
    """What of an instance type decides. `cores` are the NeuronCores that a training pod has, one process each."""

    name: str
    cores: int


def check_model(
    method: Mapping[str, Any], tp_size: int, pp_size: int, model: NeuronModel, node: NeuronNode | None
) -> tuple[Problem, ...]:
    """Every reason why the vendor's stack cannot train `model` so split; `method` is spec.method with its defaults."""
    return (
        *_type_problems(model, pp_size),
        *split_problems(tp_size, pp_size, model, node),
        *_tied_problems(method, pp_size, model),
        *_target_problems(method, tp_size, pp_size, model, node),
    )


def split_problems(tp_size: int, pp_size: int, model: NeuronModel, node: NeuronNode | None) -> tuple[Problem, ...]:
    """The part of check_model that is arithmetic of the two sizes."""
    return tuple(_split_problems(tp_size, pp_size, model, node))


def check_cores(parallelism: Mapping[str, Any], node: NeuronNode) -> tuple[Problem, ...]:
    """Cores of the nodes that would do nothing, or that are not there. `parallelism` is stage.json's.

    The published walkthrough on Kubernetes once started 8 processes with tensor parallel size 8 on 32 cores: 24 idled.
    """
    sizes = ("tensorParallelSize", "pipelineParallelSize", "dataParallelSize")
    nodes = int(parallelism["numNodes"])
    used, there = math.prod(int(parallelism[name]) for name in sizes), nodes * node.cores
    if used == there:
        return ()
    shown = " x ".join(f"{name} {parallelism[name]}" for name in sizes)
    model_size = int(parallelism["tensorParallelSize"]) * int(parallelism["pipelineParallelSize"])
    data, rest = divmod(there, model_size)
    fix = (
        f"use dataParallelSize {data}"
        if not rest and data
        else f"use sizes whose product divides {there}, such as tensorParallelSize {_largest_divisor(there)}"
    )
    what = f"{there - used} of them idle" if used < there else f"{used - there} are not there"
    return (
        Problem(
            "parallelism",
            used,
            f"{shown} are {used} NeuronCores, and {nodes} x {node.name} have {there}: {what}; {fix}",
        ),
    )


def check_groups(parallelism: Mapping[str, Any], node: NeuronNode) -> tuple[Problem, ...]:
    """Sizes from which the vendor cannot make its groups of ranks. `parallelism` is stage.json's.

    On trn1 with tensor parallel size 4 the ranks of a group are not neighbours but a quarter of a node's cores apart,
    so that each node's cores have to be whole groups of one pipeline stage (neuronx-distributed 0.15,
    parallel_layers/parallel_state.py:586; anything else is a RuntimeError on every rank).
    """
    tp, pp, dp = (int(parallelism[f"{name}ParallelSize"]) for name in ("tensor", "pipeline", "data"))
    groups = node.cores // _APART
    if tp != _APART or instance_family(node.name) not in ("trn1", "trn1n") or (groups and dp % groups == 0):
        return ()
    fixes = [] if pp == 1 else ["pipelineParallelSize 1"]
    other = next((size for size in (8, 2) if node.cores % (size * pp) == 0), None)
    fixes += [] if other is None else [f"tensorParallelSize {other}"]
    why = f"has {node.cores} of them"
    if groups:
        why = (
            f"has {groups} groups of {_APART}: the data parallel size must be a multiple of {groups}, is {dp} with "
            f"pipelineParallelSize {pp}"
        )
    message = f"tensorParallelSize {tp} on {node.name} takes cores of one node that are no neighbours, and a node {why}"
    return (Problem(_TP, tp, f"{message}: use {' or '.join(fixes)}"),)


def check_stack(instance_type: str, sdk: str) -> Problem | None:
    """Why `instance_type` cannot be trained on with that Neuron SDK; None where nothing is known against it."""
    row = find_stack(instance_type, sdk)
    if row is None or row.verdict != "broken":
        return None
    sound = ", ".join(sound_types())
    others = [each.sdk for each in STACKS if each.family == row.family and each.verdict != "broken"]
    fix = f"use an image of SDK {others[0]}" if others else f"use an instance type of {sound}"
    return Problem(
        "spec.accelerator.instanceType",
        instance_type,
        f"{instance_type} with Neuron SDK {sdk} is known not to work: {row.why} ({row.source}); {fix}",
    )


def stack_doubt(instance_type: str, sdk: str) -> str | None:
    """What is not sure about a pair, as a sentence; None where the table says that it works, or that it does not."""
    row = find_stack(instance_type, sdk)
    if row is None:
        return (
            f"Nothing is known of {instance_type} with Neuron SDK {sdk}: families that were looked at are "
            f"{', '.join(sound_types())}."
        )
    return f"{instance_type} with Neuron SDK {sdk}: {row.why}." if row.verdict == "doubtful" else None


def check_caches(environment: Mapping[str, str], where: str) -> tuple[Problem, ...]:
    """Cache folders of an environment that the vendor's tools would not agree on; `where` is the field's path."""
    problems = []
    paths = cache_paths(environment)
    for variable, path in paths.items():
        try:
            check_cache_path(path)
        except ValueError as error:
            problems.append(Problem(where, path, f"{variable}: {error}"))
    if len(set(paths.values())) > 1 and not problems:
        shown = " and ".join(f"{variable} {path}" for variable, path in paths.items())
        problems.append(Problem(where, list(paths.values()), f"{shown} name different caches: use one path in both"))
    return tuple(problems)


def neuron_model(config: Mapping[str, Any]) -> NeuronModel:
    """The facts of a model's config.json. KeyError names a size that it does not have."""
    heads = int(config["num_attention_heads"])
    return NeuronModel(
        model_type=str(config.get("model_type") or ""),
        hidden_size=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        intermediate_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        biased=has_biases(config),
    )


def has_biases(config: Mapping[str, Any]) -> bool:
    """Whether config.json gives the linear layers of a block biases, in the words of the vendor's three families."""
    return bool(config.get("attention_bias")) or bool(config.get("mlp_bias"))


def neuron_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """LoRA's target modules as the vendor's wrapper takes them: all-linear as the seven names that it stands for.

    The vendor compares all-linear with a set of names and never finds it (transformations_utils.py:422, :955), and peft
    looks for torch.nn.Linear, which a parallel layer is not.
    """
    return NEURON_LINEAR if ALL_LINEAR in targets else tuple(targets)


def needs_shared_heads(tp_size: int, kv_heads: int) -> bool:
    """Whether the vendor makes one layer of q, k and v, because keys and values do not come out even
    (models/training/llama/modeling_llama.py, LlamaAttention)."""
    return kv_heads < tp_size or kv_heads % tp_size != 0


def _type_problems(model: NeuronModel, pp_size: int) -> Iterator[Problem]:
    if not model.model_type:
        return
    types = [f"{name} (tensor parallelism only)" if not pp else name for name, pp in MODEL_TYPES.items()]
    if model.model_type not in MODEL_TYPES:
        yield Problem(
            "spec.model.source",
            model.model_type,
            f"model type {model.model_type} cannot be trained on Trainium by optimum-neuron 0.4.5, whose model types "
            f"are {', '.join(types)}: use such a model, or accelerator type cuda or cpu",
        )
    elif pp_size > 1 and not MODEL_TYPES[model.model_type]:
        yield Problem(
            _PP,
            pp_size,
            f"model type {model.model_type} takes no pipeline stages on Trainium, pipelineParallelSize is {pp_size}: "
            "use 1 and a larger tensorParallelSize",
        )
    if model.hidden_size % model.heads:
        yield Problem(
            "spec.model.source",
            model.heads,
            f"the model's {model.heads} attention heads do not divide its hidden size {model.hidden_size}, which the "
            "vendor's attention asks for: use another model, or accelerator type cuda or cpu",
        )
    if model.biased:
        yield Problem(
            "spec.model.source",
            model.model_type,
            "the model's linear layers have biases (attention_bias or mlp_bias in config.json), which optimum-neuron "
            "leaves out: use a model without them, or accelerator type cuda or cpu",
        )


def _split_problems(tp: int, pp: int, model: NeuronModel, node: NeuronNode | None) -> Iterator[Problem]:
    on_trn2 = node is not None and instance_family(node.name) == "trn2"
    if reasons := list(_tensor_reasons(tp, model, on_trn2)):
        sizes = [size for size in range(1, MAX_SPLIT + 1) if not any(_tensor_reasons(size, model, on_trn2))]
        yield Problem(_TP, tp, f"tensorParallelSize {tp} {', '.join(reasons)}: {_nearest(sizes, tp)}")
    if model.layers % pp:
        sizes = [size for size in range(1, MAX_SPLIT + 1) if model.layers % size == 0]
        message = f"pipelineParallelSize {pp} does not divide the model's {model.layers} layers: {_nearest(sizes, pp)}"
        yield Problem(_PP, pp, message)


def _tensor_reasons(tp: int, model: NeuronModel, on_trn2: bool) -> Iterator[str]:
    """What is wrong with a tensor parallel size, as the ends of a sentence."""
    parts = {
        "attention heads": model.heads,
        "MLP's width": model.intermediate_size,
        "vocabulary": model.vocab_size,
    }
    for what, size in parts.items():
        if size % tp:
            yield f"does not divide the model's {what} ({size})"
    # Fewer key and value heads than ranks are held several times each, which comes out even for a multiple only.
    copies = max(1, tp // model.kv_heads)
    if model.kv_heads * copies % tp:
        yield f"neither divides the model's key and value heads ({model.kv_heads}) nor is a multiple of them"
    elif tp > model.kv_heads and on_trn2:
        # neuronx-distributed groups neighbouring ranks on trn2 and optimum-neuron lays the copies out in turns: the
        # gradients of different heads are summed (found in a simulation of both on CPU).
        yield f"is more than the model's key and value heads ({model.kv_heads}), whose copies train apart on trn2"


def _tied_problems(method: Mapping[str, Any], pp: int, model: NeuronModel) -> Iterator[Problem]:
    # The vendor unties them and trains two copies (models/training/modeling_utils.py:1318).
    if model.tied and pp > 1 and method.get("type") == "full":
        yield Problem(
            _PP,
            pp,
            f"pipelineParallelSize is {pp}, method.type is full, and the model's embedding and output layer are one "
            "matrix (tied embeddings), of which the vendor trains two copies on different stages: use 1, or "
            "method.type lora",
        )


def _target_problems(
    method: Mapping[str, Any], tp: int, pp: int, model: NeuronModel, node: NeuronNode | None
) -> Iterator[Problem]:
    """q, k and v are one layer with one A where their heads are shared: an adapter on some of them is none there."""
    lora = method.get("lora")
    if not lora or not needs_shared_heads(tp, model.kv_heads):
        return
    named = list(lora["targetModules"])
    targets = neuron_targets(named)
    missing = [name for name in _QKV if name not in targets]
    if not missing or len(missing) == len(_QKV):
        return
    fixes = [f"add {' and '.join(missing)} to targetModules"]
    sound = [
        size
        for size in range(1, min(model.kv_heads, MAX_SPLIT) + 1)
        if not needs_shared_heads(size, model.kv_heads) and not any(_split_problems(size, pp, model, node))
    ]
    if near := nearest_sizes(sound, tp):
        fixes.append(f"use tensorParallelSize {near[0]}")
    yield Problem(
        "spec.method.lora.targetModules",
        named,
        f"at tensorParallelSize {tp} the model's {model.kv_heads} key and value heads do not come out even, so that q, "
        f"k and v become one layer that has an adapter as a whole or none, and targetModules has "
        f"{', '.join(name for name in _QKV if name in targets)} without {' and '.join(missing)}: {', or '.join(fixes)}",
    )


def _nearest(sizes: Sequence[int], wanted: int) -> str:
    """The sound sizes next to `wanted`, as a remedy; 1 always is one."""
    return f"use {' or '.join(map(str, nearest_sizes(sizes, wanted)))}"


def _largest_divisor(count: int) -> int:
    return max(size for size in range(1, MAX_SPLIT + 1) if count % size == 0)
