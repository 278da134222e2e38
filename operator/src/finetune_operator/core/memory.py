"""What one rank of a training holds in its device's memory, by arithmetic: weights, gradients, optimizer, activations,
logits.

Called by preflight.py, which compares it with the instance, and by plan.py, which reports it. The first three follow
exactly from the trainer's number formats (finetune_trainer.methods, backends/torch_strategies.py). The last two are
estimates for an attention that never stores its matrix of scores, but on Neuron for the vendor's eager one, which does,
and without sequence parallelism; TOLERANCE says how good they are. Not counted: the device's context and communication
buffers, fragmentation, what one layer needs for a moment (a quantized weight in full width, DoRA's product of its
matrices), and the process itself. Of a mixture of experts the weights are counted whole, as every rank holds them, and
the activations of one expert, as if each token went to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator.api.spec import FineTuneJobSpec, Lora
from finetune_operator.core.model_shapes import ModelShape
from finetune_operator.core.parallelism import Parallelism
from finetune_trainer.spec_rules import ALL_LINEAR, FLASH_TOKENS

GIB = 1024**3

TOLERANCE = 0.25
"""Largest relative error of the activations' estimate, against what autograd keeps of a Llama: a test measures it."""

EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Names of the two modules that have a row for each token of the vocabulary; in some models they are one matrix."""

_ONE_LAYER = re.compile(r"\.\d+\.")
"""A name with a number in it is of one block, one without of every block."""
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
    """The memory of the fullest rank, in bytes: states, activations and logits as told at the functions below."""
    t = parallelism.tp_size
    wide = _wide(spec)
    tokens = spec.dataset.max_length * parallelism.micro_batch_size
    weights, gradients, optimizer = _states(spec, parallelism, shape)
    logits = tokens * shape.vocab_size / t * (wide + 12)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=tokens * _activations(spec, parallelism, shape),
        logits=logits,
        certain_logits=logits if spec.dataset.loss_on == "all" else 0.0,
    )


def trainable_parameters(spec: FineTuneJobSpec, shape: ModelShape) -> int:
    """Parameters that training changes, as the trainer counts them (finetune_trainer.methods.find_trainables).

    All of them with full, tied ones once. With an adapter rank * (inputs + outputs) for each adapted layer (Hu et al.
    2021, "LoRA"), one more for each output with DoRA (Liu et al. 2024, "DoRA", section 4.1), and those of the modules
    that are saved whole. A module whose name no family of the table has counts as one from the hidden to the
    intermediate size.
    """
    lora = spec.method.lora
    if lora is None:
        return shape.parameters
    extra = 1 if lora.variant == "dora" else 0
    adapted = sum(
        count * (lora.rank * (inputs + outputs) + extra * outputs) for count, inputs, outputs in _targets(lora, shape)
    )
    return adapted + sum(_saved_parameters(name, shape) for name in lora.modules_to_save)


def _states(spec: FineTuneJobSpec, parallelism: Parallelism, shape: ModelShape) -> tuple[float, float, float]:
    """Weights, gradients and optimizer: what is held through the whole training (Rajbhandari et al. 2020, "ZeRO", 3.1).

    On CPU and CUDA what trains is float32 in both precisions: 4 bytes a parameter of weights, 4 of gradients, 8 of two
    moments. With bf16 autocast keeps a copy of 2 bytes of each matrix that it multiplies with. A frozen base is held
    once and without gradients: bf16 2 bytes, fp32 4; int8 1 and nf4 0.5625 in the layers, the embeddings as without.

    On Neuron what trains is bf16: 2 bytes a parameter of weights and 4 of gradients, which are summed in float32
    (use_fp32_grad_acc), and 12 of optimizer, a float32 copy and two moments, of which each data parallel rank has its
    share (ZeRO stage 1, section 5.1 there; neuronx-distributed 0.15, NeuronZero1Optimizer). Where tensor parallel ranks
    are more than key and value heads, each holds a whole head of them.

    Tensor and pipeline parallelism divide all of it. Of data parallel ranks each has all of it with ddp, and with fsdp
    its share (Zhao et al. 2023, "PyTorch FSDP", section 3.2). Then the embeddings are whole for the pass, and two
    blocks, the one that computes and the one that is fetched meanwhile, in `precision`. The gradients of `full` are
    shares too, and beside them one unit's are whole for its reduction: in `precision`, and in float32 to be summed. An
    adapter's stay whole until the last micro batch.
    """
    t, p = parallelism.tp_size, parallelism.pp_size
    wide, trained = _wide(spec), trainable_parameters(spec, shape)
    if not _is_on_torch(spec):
        return _neuron_states(spec, parallelism, shape)
    is_copied = wide == 2
    shares = parallelism.dp_size if parallelism.strategy == "fsdp" else 1
    embeddings = min(shape.embedding_parameters, shape.parameters)
    block = (shape.parameters - embeddings) / shape.layers
    if spec.method.type == "full":
        base, per_rank = 0.0, trained / (t * p)
        looked_up = 0 if shape.tied else min(shape.vocab_size * shape.hidden_size, shape.parameters)
        copies = 2 * (shape.parameters - looked_up) / (t * p) if is_copied else 0.0
    else:
        base, per_rank = _base_bytes(spec.method.quantization, wide, shape) / (t * p), trained / p
        copies = 2 * per_rank if is_copied else 0.0
    if parallelism.strategy == "ddp":
        return base + 4 * per_rank + copies, 4 * per_rank, 8 * per_rank
    whole = wide * (embeddings + 2 * block)
    gradients = 4 * per_rank
    if spec.method.type == "full":
        gradients = 4 * per_rank / shares + (wide + 4) * max(embeddings, block)
    return (base + 4 * per_rank) / shares + whole, gradients, 8 * per_rank / shares


def _neuron_states(spec: FineTuneJobSpec, parallelism: Parallelism, shape: ModelShape) -> tuple[float, float, float]:
    """_states of the Neuron backend. An adapter counts whole on each tensor parallel rank."""
    t, p = parallelism.tp_size, parallelism.pp_size
    copied = 0.0
    if t > shape.kv_heads:
        copied = 2 * shape.layers * shape.hidden_size * shape.kv_size * (1 / shape.kv_heads - 1 / t) / p
    held = shape.parameters / (t * p) + copied
    trained = held if spec.method.type == "full" else trainable_parameters(spec, shape) / p
    weights = 2 * held if spec.method.type == "full" else 2 * (held + trained)
    return weights, 4 * trained, 12 * trained / parallelism.dp_size


def _activations(spec: FineTuneJobSpec, parallelism: Parallelism, shape: ModelShape) -> float:
    """Bytes that autograd keeps of one token through all layers.

    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2, without its
    term of attention scores, which a fused attention does not keep (their section 5; Dao et al. 2022): a layer keeps
    h * (10 + 24/t) bytes a token in 16-bit numbers, of which 16/t are the two tensors of width 4h in the MLP. With the
    model's own width i that is h * (10 + 8/t) + 4*i/t, and a gated MLP keeps four such tensors. The first pipeline
    stage holds one micro batch for every stage (1F1B), so it keeps all layers' activations of one.

    What the paper does not have, measured with autograd's hooks on the backend of CPU and CUDA: with `full` in bf16
    autocast leaves residuals and norms in float32, 20 h more; an adapter in float32 has its input copied to bf16, and
    keeps its own product of width `rank`; dropout keeps another input of 4 bytes; DoRA keeps two tensors of its
    outputs.

    On Neuron an adapter is bf16: of each it keeps the product of width `rank` and, with dropout, another input. The
    vendor's eager attention keeps of every head and pair of tokens the softmax in float32 and in bf16: 6 bytes
    (equation 2's term of scores without dropout, which has 2 in bf16 only).

    With gradientCheckpointing each layer keeps its input only, and one layer at a time all of the above (Chen et al.
    2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    wide, h, t = _wide(spec), shape.hidden_size, parallelism.tp_size
    is_wide_stream = spec.method.type == "full" and _is_on_torch(spec)
    mlp = (8 if shape.has_gated_mlp else 4) * shape.intermediate_size
    layer = (h * (10 + 8 / t) + mlp / t) * wide / 2
    if is_wide_stream and wide == 2:
        layer += 20 * h
    lora = spec.method.lora
    if _keeps_scores(spec, parallelism):
        layer += 6 * shape.heads / t * spec.dataset.max_length
    if lora is not None and not _is_on_torch(spec):
        for count, inputs, _ in _targets(lora, shape):
            layer += (2 * lora.rank + (2 * inputs if lora.dropout else 0)) * count / shape.layers
    elif lora is not None:
        for count, inputs, outputs in _targets(lora, shape):
            kept = wide * lora.rank + (2 * inputs if wide == 2 else 0) + (4 * inputs if lora.dropout else 0)
            kept += 2 * wide * outputs if lora.variant == "dora" else 0
            layer += kept * count / shape.layers
    if not spec.training.gradient_checkpointing:
        return shape.layers * layer
    return shape.layers * h * (4 if is_wide_stream else wide) + layer


def _keeps_scores(spec: FineTuneJobSpec, parallelism: Parallelism) -> bool:
    """Whether attention stores its matrix of scores: on Neuron with rows that the flash kernel does not take, and where
    a mask keeps records of a row apart (finetune_trainer/backends/neuron_config.py, attention_of)."""
    if _is_on_torch(spec):
        return False
    is_masked = spec.dataset.packing != "none" and parallelism.pp_size == 1 and spec.dataset.max_length <= FLASH_TOKENS
    return is_masked or spec.dataset.max_length % FLASH_TOKENS != 0


def _targets(lora: Lora, shape: ModelShape) -> Iterator[tuple[int, int, int]]:
    """(how many in the model, inputs, outputs) of each linear layer that gets an adapter."""
    if ALL_LINEAR in lora.target_modules:
        yield from ((shape.layers, inputs, outputs) for inputs, outputs in _block_layers(shape).values())
        return
    known = {**_linear_layers(shape), **dict.fromkeys(OUTPUT_LAYERS, (shape.hidden_size, shape.vocab_size))}
    for target in lora.target_modules:
        name = target.rpartition(".")[2]
        count = 1 if name in OUTPUT_LAYERS or _ONE_LAYER.search(target) else shape.layers
        yield (count, *known.get(name, (shape.hidden_size, shape.intermediate_size)))


def _block_layers(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer of one transformer block, by the layout of the model's family."""
    names: tuple[str, ...]
    if shape.fused:
        names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    elif shape.has_gated_mlp:
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    else:
        names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    layers = _linear_layers(shape)
    return {name: layers[name] for name in names}


def _linear_layers(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of linear layers by the names that the families give them."""
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.kv_size
    return {
        "q_proj": (h, q),
        **dict.fromkeys(("o_proj", "out_proj", "dense"), (q, h)),
        **dict.fromkeys(("k_proj", "v_proj"), (h, kv)),
        **dict.fromkeys(("query_key_value", "qkv_proj"), (h, q + 2 * kv)),
        **dict.fromkeys(("gate_proj", "up_proj", "dense_h_to_4h", "fc1"), (h, i)),
        **dict.fromkeys(("down_proj", "dense_4h_to_h", "fc2"), (i, h)),
        "gate_up_proj": (h, 2 * i),
    }


def _saved_parameters(target: str, shape: ModelShape) -> int:
    """Parameters of one of modulesToSave: an embedding, the last norm, or a layer of every block.

    Where an MLP is not gated (BLOOM), linear layers have a bias, and norms two vectors.
    """
    name = target.rpartition(".")[2]
    if name in (*EMBEDDINGS, *OUTPUT_LAYERS):
        return shape.vocab_size * shape.hidden_size
    vectors = 1 if shape.has_gated_mlp else 2
    if name in ("norm", "ln_f", "word_embeddings_layernorm"):
        return vectors * shape.hidden_size
    count = 1 if _ONE_LAYER.search(target) else shape.layers
    if name.endswith(("norm", "layernorm")):
        return count * vectors * shape.hidden_size
    inputs, outputs = _linear_layers(shape).get(name, (shape.hidden_size, shape.intermediate_size))
    return count * (inputs * outputs + (vectors - 1) * outputs)


def _is_on_torch(spec: FineTuneJobSpec) -> bool:
    """True for the backend of CPU and CUDA, which trains float32 weights under autocast."""
    return spec.accelerator.type != "neuron"


def _wide(spec: FineTuneJobSpec) -> int:
    """Bytes of a number in spec.training.precision."""
    return 2 if spec.training.precision == "bf16" else 4


def _base_bytes(quantization: str, wide: int, shape: ModelShape) -> float:
    """Bytes of the whole frozen base. Quantization leaves the embeddings as they are."""
    per_weight = {"none": float(wide), "int8": 1.0, "nf4": _NF4_BYTES}[quantization]
    embeddings = min(shape.embedding_parameters, shape.parameters)
    return embeddings * wide + (shape.parameters - embeddings) * per_weight
