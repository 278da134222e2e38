"""What one rank of a training holds in its device's memory, by arithmetic: weights, gradients, optimizer, activations,
logits.

Called by preflight.py, which compares it with the instance, and by plan.py, which reports it. The first three follow
exactly from the trainer's number formats. The last two are estimates for a trainer without sequence parallelism, and
with an attention that never stores its matrix of scores; TOLERANCE says how good they are. Not counted: the device's
context and
communication buffers, fragmentation, and the process itself. Of a mixture of experts the weights are counted whole, as
every rank holds them, and the activations of one expert, as if each token went to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.spec import FineTuneJobSpec
from finetune_operator.core.model_shapes import ModelShape
from finetune_operator.core.parallelism import Parallelism

GIB = 1024**3

TOLERANCE = 0.25
"""Largest relative error of the activations' estimate, against what autograd keeps of a Llama: a test measures it."""

_NF4_BYTES = 0.5 + 4 / 64
"""Bytes of an nf4 weight: 4 bits, and one float32 scale for 64 weights (Dettmers et al. 2023, "QLoRA", section 3)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    certain_logits: float
    """The part of `logits` that no dataset avoids: none where only answers are learnt, since few tokens may be."""

    @property
    def states(self) -> float:
        """What is held through the whole training, whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + self.activations + self.logits

    @property
    def least(self) -> float:
        """What the rank needs even if the estimates are as much too high as they can be."""
        return self.states + (1 - TOLERANCE) * (self.activations + self.certain_logits)

    def parts_gib(self) -> dict[str, float]:
        """The parts in GiB, by the names that status.plan and messages use."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
        }
        return {name: value / GIB for name, value in parts.items()}


def estimate_memory(spec: FineTuneJobSpec, parallelism: Parallelism, shape: ModelShape) -> MemoryEstimate:
    """The memory of the fullest rank, in bytes.

    States: Rajbhandari et al. 2020, "ZeRO", section 3.1. `full` in bf16 holds 2 bytes a parameter of weights, 2 of
    gradients and 12 of optimizer (float32 copy and two moments); in fp32 4, 4 and 8. `lora` holds the base once and
    without gradients (bf16 2 bytes, fp32 4; int8 1 and nf4 0.5625 in the layers, 2 or 4 in the embeddings), and
    4 + 4 + 8 for each of the adapter's parameters, which the trainer keeps in float32 with a float32 gradient and two
    moments. Tensor and pipeline parallelism divide them. With strategy ddp every data parallel rank has all of it; with
    fsdp each has a share, and the weights of one layer and of the embeddings whole while it computes.

    Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2,
    without its term of attention scores, which a fused attention does not keep (their section 5; Dao et al. 2022): a
    layer keeps s*b*h * (10 + 24/t) bytes in 16-bit numbers, of which 16/t are the two tensors of width 4h in the MLP.
    With the model's own width i that is s*b*(h * (10 + 8/t) + 4*i/t), and a gated MLP keeps four such tensors. The
    first pipeline stage holds one micro batch for every stage (1F1B), so it keeps all layers' activations of one. With
    gradient checkpointing (Chen et al. 2016) it keeps the input of each layer, s*b*h, and one layer's activations.

    Logits: s*b*v/t, each four times for a moment in the backward pass: as the model gives it, its log-softmax, and the
    gradients of both in float32.
    """
    t, p = parallelism.tp_size, parallelism.pp_size
    wide = 2 if spec.training.precision == "bf16" else 4
    if spec.method.type == "full":
        optimizer_bytes = 12 if wide == 2 else 8
        per_rank = shape.parameters / (t * p)
        weights, gradients, optimizer = wide * per_rank, wide * per_rank, optimizer_bytes * per_rank
    else:
        adapter = trainable_parameters(spec, shape) / p
        weights = _base_bytes(spec.method.quantization, wide, shape) / (t * p) + 4 * adapter
        gradients, optimizer = 4 * adapter, 8 * adapter
    if parallelism.strategy == "fsdp":
        whole = shape.embedding_parameters + (shape.parameters - shape.embedding_parameters) / shape.layers
        weights = weights / parallelism.dp_size + wide * whole
        gradients, optimizer = gradients / parallelism.dp_size, optimizer / parallelism.dp_size
    tokens = spec.dataset.max_length * parallelism.micro_batch_size
    mlp = (8 if shape.has_gated_mlp else 4) * shape.intermediate_size
    layer = shape.hidden_size * (10 + 8 / t) + mlp / t
    # bytes in 16-bit numbers, like `layer`: two for each number of a layer's input
    kept = (
        2 * shape.layers * shape.hidden_size + layer if spec.training.gradient_checkpointing else shape.layers * layer
    )
    logits = tokens * shape.vocab_size / t * (wide + 12)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=tokens * kept * wide / 2,
        logits=logits,
        certain_logits=logits if spec.dataset.loss_on == "all" else 0.0,
    )


def trainable_parameters(spec: FineTuneJobSpec, shape: ModelShape) -> int:
    """Parameters that training changes: all, or rank * (inputs + outputs) of each adapted layer (Hu et al. 2021).

    A module whose name no family of the table has counts as one from the hidden to the intermediate size.
    """
    if spec.method.lora is None:
        return shape.parameters
    widths = _module_widths(shape)
    unknown = shape.hidden_size + shape.intermediate_size
    names = (target.rpartition(".")[2] for target in spec.method.lora.target_modules)
    return shape.layers * spec.method.lora.rank * sum(widths.get(name, unknown) for name in names)


def _module_widths(shape: ModelShape) -> dict[str, int]:
    """Inputs + outputs of the linear layers of one transformer layer, by the names that the families give them."""
    h, i, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
    attention = {
        "q_proj": 2 * h,
        "o_proj": 2 * h,
        "out_proj": 2 * h,
        "dense": 2 * h,
        "k_proj": h + kv,
        "v_proj": h + kv,
    }
    fused = {"query_key_value": 2 * h + 2 * kv, "qkv_proj": 2 * h + 2 * kv, "gate_up_proj": h + 2 * i}
    mlp = ("gate_proj", "up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2")
    return {**attention, **fused, **dict.fromkeys(mlp, h + i)}


def _base_bytes(quantization: str, wide: int, shape: ModelShape) -> float:
    """Bytes of the whole frozen base. Quantization leaves the embeddings as they are."""
    per_weight = {"none": float(wide), "int8": 1.0, "nf4": _NF4_BYTES}[quantization]
    embeddings = min(shape.embedding_parameters, shape.parameters)
    return embeddings * wide + (shape.parameters - embeddings) * per_weight
