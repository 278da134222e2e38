"""How the installed optimum-neuron itself cuts attention weights over ranks; optimum_neuron_facts.py calls this.

Its packages must be importable already: that program stands in for the closed ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

MODULE = "self_attn"


def layouts(cases: Sequence[dict[str, Any]]) -> list[list[dict[str, list[int]]]]:
    """For each case what each rank's parameters hold, flat, by their names within the attention module.

    A case has heads, kv_heads, head_dim, tp, copies and fuse_qkv. The whole weights are whole_weights'.
    """
    return [[_cut(case, rank) for rank in range(case["tp"])] for case in cases]


def whole_weights(case: dict[str, Any], module: str = MODULE) -> dict[str, torch.Tensor]:
    """Weights of an attention module on hidden size 1, all elements numbered differently."""
    queries, keys = case["heads"] * case["head_dim"], case["kv_heads"] * case["head_dim"]
    return {
        f"{module}.q_proj.weight": torch.arange(queries).reshape(-1, 1),
        f"{module}.k_proj.weight": 10000 + torch.arange(keys).reshape(-1, 1),
        f"{module}.v_proj.weight": 20000 + torch.arange(keys).reshape(-1, 1),
        f"{module}.o_proj.weight": 30000 + torch.arange(queries).reshape(1, -1),
    }


def _cut(case: dict[str, Any], rank: int) -> dict[str, list[int]]:
    """What `rank` holds by the vendor's own transformation of whole weights."""
    vendor = importlib.import_module("optimum.neuron.models.training.transformations_utils")
    heads, kv_heads, size, tp = case["heads"], case["kv_heads"], case["head_dim"], case["tp"]
    for name, value in (("get_tensor_model_parallel_size", tp), ("get_tensor_model_parallel_rank", rank)):
        setattr(vendor, name, lambda value=value: value)
    spec = vendor.GQAQKVColumnParallelLinearSpec(
        "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", heads, kv_heads, case["copies"],
        heads // tp * size, kv_heads * case["copies"] // tp * size, case["fuse_qkv"], False, tp_size=tp,
    )  # fmt: skip
    local = spec._adapt_state_dict(MODULE, {}, whole_weights(case), {})
    return {name.removeprefix(f"{MODULE}."): tensor.flatten().tolist() for name, tensor in local.items()}
