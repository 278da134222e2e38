"""How fast and how well a training computes: arithmetic of a model, utilisation of its devices, memory used.

backends/ measure a model once with model_size and know their device's peak; training.py turns what it counted between
two log lines into a Speed, which goes to timings.jsonl, TensorBoard and progress and never into training.jsonl, for
that is a function of the job alone. Nothing here imports a vendor's library.

Model FLOPs utilisation (MFU) is the arithmetic that the model and the method need, over what the devices could do in
the same time (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). What a run computes beyond that, such as
activations a second time under gradient checkpointing, does not count, nor does what it saves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TERA = 1e12

PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("trn1", 190.0, 47.5),
    ("trn2", 667.0, 181.0),
)
"""(device, bf16, fp32): dense peak of one whole device in 10^12 operations a second, by its maker.

NVIDIA's data sheets (tensor cores for bf16, without sparsity; fp32 without TF32, as torch multiplies by default), for
A10G the one that AWS published; the Neuron documentation's pages on the Trainium and Trainium2 chips, which have two
and eight cores. The first entry that the device's own name contains counts.
"""

_STATUS = Path("/proc/self/status")
_PEAK_RESIDENT = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelSize:
    """What one token costs in a model.

    `weights` counts the numbers of all matrices that a token is multiplied with: linear layers, the output layer and
    adapters, not the embedding, which is looked up. `trained` are those of them whose gradient is needed.
    `attention_width` is layers x heads x head dimension.
    """

    weights: int
    trained: int
    attention_width: int

    def training_flops(self, tokens: int, attended: int) -> float:
        """Operations of forward and backward pass of `tokens`; `attended` is the sum of len^2 over their documents.

        A matrix takes 2 operations a weight and token forward, 2 for the gradient of its input, and 2 for its own where
        it is trained: 6 N in full training, 4 N + 2 x trainable with frozen weights, as LoRA has them. Attention
        multiplies queries with keys and weights with values: 4 x width x length a token forward, twice that backward,
        whatever is trained. PaLM's 12 L H Q T, with T the length of the token's own document: none sees another.
        """
        return (4.0 * self.weights + 2.0 * self.trained) * tokens + 12.0 * self.attention_width * attended


@dataclass(frozen=True)
class Speed:
    """What was measured between two log lines, over all ranks; memory is of rank 0, at its highest so far.

    `step_seconds` is the time of one optimizer step, `data_wait_seconds` the part of it in which rows were read.
    `mfu` is a share of 1, None where model or device is not known; `device_memory_bytes` None on the host.
    """

    seconds: float
    tokens_per_second: float
    step_seconds: float
    data_wait_seconds: float
    mfu: float | None
    host_memory_bytes: int | None
    device_memory_bytes: int | None

    def as_json(self) -> dict[str, float]:
        """Rounded, by the names of timings.jsonl and of progress; what is not known is left out."""
        found: dict[str, float | None] = {
            "seconds": round(self.seconds, 6),
            "tokensPerSecond": round(self.tokens_per_second, 1),
            "stepSeconds": round(self.step_seconds, 6),
            "dataWaitSeconds": round(self.data_wait_seconds, 6),
            "mfu": None if self.mfu is None else round(self.mfu, 5),
            "hostMemoryBytes": self.host_memory_bytes,
            "deviceMemoryBytes": self.device_memory_bytes,
        }
        return {name: value for name, value in found.items() if value is not None}


def peak_flops(device: str, precision: str) -> float | None:
    """Operations a second that one device of this name can do at most in bf16 or fp32; None for one not in the table.

    `device` is its maker's name for it, such as "NVIDIA A100-SXM4-40GB". No processor of a host is in the table.
    """
    for name, bf16, fp32 in PEAK_TFLOPS:
        if name.lower() in device.lower():
            return (bf16 if precision == "bf16" else fp32) * TERA
    return None


def utilisation(flops: float, seconds: float, peak: float | None, devices: int) -> float | None:
    """MFU as a share of 1: `flops` in `seconds` on devices of which each can do `peak` a second; None if not known."""
    return flops / seconds / (peak * devices) if flops and seconds and peak else None


def model_size(model: Any) -> ModelSize | None:
    """The ModelSize of a transformers model, adapted by peft or not; None where it cannot be told.

    That is a mixture of experts, whose tokens pass only some of its weights, and a config without the usual sizes.
    Quantised layers count by the shape that they stand for.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not layers or not heads or not hidden or any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return None
    width = layers * heads * (getattr(config, "head_dim", None) or hidden // heads)
    weights = trained = 0
    for name, module in model.named_modules():
        # peft keeps the original beside the copy that it trains in its place
        if ".original_module" in name:
            continue
        size = _matrix_size(module)
        weights += size
        if size and module.weight.requires_grad:
            trained += size
    return ModelSize(weights, trained, width)


def _matrix_size(module: Any) -> int:
    """Inputs x outputs of a linear layer, 0 for any other module and for peft's wrappers of one."""
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        return 0
    if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "weight"):
        return int(module.in_features) * int(module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        return int(module.weight.numel())
    return 0


def peak_host_memory(status: Path = _STATUS) -> int | None:
    """Bytes of memory that this process had resident at most; None where the kernel does not say."""
    try:
        match = _PEAK_RESIDENT.search(status.read_text(encoding="ascii"))
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
