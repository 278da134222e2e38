"""The sizes of base models, by which parallelism and memory are checked before any pod is started.

find_shape is called by preflight.py and plan.py. Well-known hub models are known beforehand from the table below, whose
rows are the models' public config.json; an installation can add its own (the chart's `models`). Of every other model
prepare reports the sizes, so that it is checked after prepare and before compile and train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from finetune_operator.api.finetunejob import FineTuneJob

_HUB = "hf://"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer. `parameters` counts tied embeddings once; `tied` says that the output
    layer is the embedding, `fused` that queries, keys and values are one layer, and gate and up another (Phi-3).
    `model_type` is config.json's, "" where nobody says it; `biased`: attention or MLP layers have biases in a family
    that can do without. `head_dim` is the width of a head where it is not hidden_size / heads (Qwen3), else 0.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    tied: bool = False
    fused: bool = False
    model_type: str = ""
    biased: bool = False
    head_dim: int = 0

    @property
    def head_size(self) -> int:
        """Width of one attention head, in numbers."""
        return self.head_dim or self.hidden_size // self.heads

    @property
    def query_size(self) -> int:
        """Width of all queries of one token, in numbers: the hidden size in most models."""
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all keys of one token, in numbers; that of the values is the same."""
        return self.kv_heads * self.head_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, where it is a matrix of its own, of the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def has_gated_mlp(self) -> bool:
        """True where an MLP has three matrices (gate, up, down: Llama, Mistral, Qwen) and not two (BLOOM, GPT).

        By arithmetic: what the other parts leave of the parameters, in matrices of hidden x intermediate size a layer.
        """
        attention = self.layers * self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        left = self.parameters - self.embedding_parameters - attention
        return left > 2.5 * self.layers * self.hidden_size * self.intermediate_size


_LLAMA2_7B = ModelShape(4096, 32, 32, 32, 11008, 32000, 6_738_415_616, model_type="llama")
_LLAMA2_13B = ModelShape(5120, 40, 40, 40, 13824, 32000, 13_015_864_320, model_type="llama")
_LLAMA2_70B = ModelShape(8192, 80, 64, 8, 28672, 32000, 68_976_648_192, model_type="llama")
_LLAMA3_8B = ModelShape(4096, 32, 32, 8, 14336, 128256, 8_030_261_248, model_type="llama")
_LLAMA3_70B = ModelShape(8192, 80, 64, 8, 28672, 128256, 70_553_706_496, model_type="llama")
_LLAMA32_1B = ModelShape(2048, 16, 32, 8, 8192, 128256, 1_235_814_400, tied=True, model_type="llama")
_LLAMA32_3B = ModelShape(3072, 28, 24, 8, 8192, 128256, 3_212_749_824, tied=True, model_type="llama")
_QWEN25_05B = ModelShape(896, 24, 14, 2, 4864, 151936, 494_032_768, tied=True, model_type="qwen2")
_QWEN25_15B = ModelShape(1536, 28, 12, 2, 8960, 151936, 1_543_714_304, tied=True, model_type="qwen2")
_QWEN25_3B = ModelShape(2048, 36, 16, 2, 11008, 151936, 3_085_938_688, tied=True, model_type="qwen2")
_QWEN25_7B = ModelShape(3584, 28, 28, 4, 18944, 152064, 7_615_616_512, model_type="qwen2")
_QWEN25_14B = ModelShape(5120, 48, 40, 8, 13824, 152064, 14_770_033_664, model_type="qwen2")
_QWEN25_32B = ModelShape(5120, 64, 40, 8, 27648, 152064, 32_763_876_352, model_type="qwen2")
_QWEN25_72B = ModelShape(8192, 80, 64, 8, 29568, 152064, 72_706_203_648, model_type="qwen2")
_MISTRAL_7B = ModelShape(4096, 32, 32, 8, 14336, 32000, 7_241_732_096, model_type="mistral")
_MISTRAL_7B_V03 = ModelShape(4096, 32, 32, 8, 14336, 32768, 7_248_023_552, model_type="mistral")
_TINYLLAMA = ModelShape(2048, 22, 32, 4, 5632, 32000, 1_100_048_384, model_type="llama")
_PHI3_MINI = ModelShape(3072, 32, 32, 32, 8192, 32064, 3_821_079_552, fused=True, model_type="phi3")
_BLOOM_560M = ModelShape(1024, 24, 16, 16, 4096, 250880, 559_214_592, tied=True, model_type="bloom")
_BLOOM_1B1 = ModelShape(1536, 24, 16, 16, 6144, 250880, 1_065_314_304, tied=True, model_type="bloom")
_BLOOM_1B7 = ModelShape(2048, 24, 16, 16, 8192, 250880, 1_722_408_960, tied=True, model_type="bloom")
_BLOOM_3B = ModelShape(2560, 30, 32, 32, 10240, 250880, 3_002_557_440, tied=True, model_type="bloom")
_BLOOM_7B1 = ModelShape(4096, 30, 32, 32, 16384, 250880, 7_069_016_064, tied=True, model_type="bloom")

_FAMILIES: Mapping[ModelShape, tuple[str, ...]] = MappingProxyType(
    {
        _LLAMA2_7B: ("meta-llama/llama-2-7b-hf", "meta-llama/llama-2-7b-chat-hf"),
        _LLAMA2_13B: ("meta-llama/llama-2-13b-hf", "meta-llama/llama-2-13b-chat-hf"),
        _LLAMA2_70B: ("meta-llama/llama-2-70b-hf", "meta-llama/llama-2-70b-chat-hf"),
        _LLAMA3_8B: (
            "meta-llama/meta-llama-3-8b",
            "meta-llama/meta-llama-3-8b-instruct",
            "meta-llama/llama-3.1-8b",
            "meta-llama/llama-3.1-8b-instruct",
            "meta-llama/meta-llama-3.1-8b",
            "meta-llama/meta-llama-3.1-8b-instruct",
        ),
        _LLAMA3_70B: (
            "meta-llama/meta-llama-3-70b",
            "meta-llama/meta-llama-3-70b-instruct",
            "meta-llama/llama-3.1-70b",
            "meta-llama/llama-3.1-70b-instruct",
            "meta-llama/meta-llama-3.1-70b",
            "meta-llama/meta-llama-3.1-70b-instruct",
            "meta-llama/llama-3.3-70b-instruct",
        ),
        _LLAMA32_1B: ("meta-llama/llama-3.2-1b", "meta-llama/llama-3.2-1b-instruct"),
        _LLAMA32_3B: ("meta-llama/llama-3.2-3b", "meta-llama/llama-3.2-3b-instruct"),
        _QWEN25_05B: ("qwen/qwen2.5-0.5b", "qwen/qwen2.5-0.5b-instruct"),
        _QWEN25_15B: ("qwen/qwen2.5-1.5b", "qwen/qwen2.5-1.5b-instruct"),
        _QWEN25_3B: ("qwen/qwen2.5-3b", "qwen/qwen2.5-3b-instruct"),
        _QWEN25_7B: ("qwen/qwen2.5-7b", "qwen/qwen2.5-7b-instruct"),
        _QWEN25_14B: ("qwen/qwen2.5-14b", "qwen/qwen2.5-14b-instruct"),
        _QWEN25_32B: ("qwen/qwen2.5-32b", "qwen/qwen2.5-32b-instruct"),
        _QWEN25_72B: ("qwen/qwen2.5-72b", "qwen/qwen2.5-72b-instruct"),
        _MISTRAL_7B: (
            "mistralai/mistral-7b-v0.1",
            "mistralai/mistral-7b-instruct-v0.1",
            "mistralai/mistral-7b-instruct-v0.2",
        ),
        _MISTRAL_7B_V03: ("mistralai/mistral-7b-v0.3", "mistralai/mistral-7b-instruct-v0.3"),
        _TINYLLAMA: (
            "tinyllama/tinyllama-1.1b-chat-v1.0",
            "tinyllama/tinyllama-1.1b-intermediate-step-1431k-3t",
        ),
        _PHI3_MINI: ("microsoft/phi-3-mini-4k-instruct", "microsoft/phi-3-mini-128k-instruct"),
        _BLOOM_560M: ("bigscience/bloom-560m", "bigscience/bloomz-560m"),
        _BLOOM_1B1: ("bigscience/bloom-1b1", "bigscience/bloomz-1b1"),
        _BLOOM_1B7: ("bigscience/bloom-1b7", "bigscience/bloomz-1b7"),
        _BLOOM_3B: ("bigscience/bloom-3b", "bigscience/bloomz-3b"),
        _BLOOM_7B1: ("bigscience/bloom-7b1", "bigscience/bloomz-7b1"),
    }
)

BUILT_IN_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {name: shape for shape, names in _FAMILIES.items() for name in names}
)
"""By the model's name on the hub, in lower case."""

_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "hiddenSize": "hidden_size",
        "layers": "layers",
        "heads": "heads",
        "kvHeads": "kv_heads",
        "intermediateSize": "intermediate_size",
        "vocabSize": "vocab_size",
        "parameters": "parameters",
    }
)
"""Keys of prepare's report and of the chart's `models`, and the fields that they fill."""

_OPTIONAL = ("tied", "biased", "modelType", "headDim")
"""Keys of both that may be left out: false, false, not known, and hiddenSize / heads."""


def model_shapes(extra: Mapping[str, Any]) -> Mapping[str, ModelShape]:
    """The built-in table with the installation's entries over it: {org/name: {hiddenSize, layers, ... , tied}}.

    ValueError lists everything that is wrong with `extra`, with the path of each.
    """
    problems: list[str] = []
    found = dict(BUILT_IN_SHAPES)
    for name, value in extra.items():
        wrong = list(_problems(name, value))
        problems.extend(wrong)
        if not wrong:
            found[name.lower()] = _shape(value)
    if problems:
        raise ValueError("; ".join(problems))
    return MappingProxyType(found)


def find_shape(
    job: FineTuneJob, reported: Mapping[str, Any] | None, shapes: Mapping[str, ModelShape] = BUILT_IN_SHAPES
) -> ModelShape | None:
    """The sizes of the job's base model, or None while nobody knows them.

    `reported` is the `model` of prepare's metrics, None before prepare's end. What prepare read of the very files wins
    over the table, which knows a model by its name alone; a report that is not whole counts as none.
    """
    if reported is not None and not list(_problems("model", reported)):
        return _shape(reported)
    source = job.spec.model.source
    return shapes.get(source.removeprefix(_HUB).lower()) if source.startswith(_HUB) else None


def _shape(value: Mapping[str, Any]) -> ModelShape:
    return ModelShape(
        **{field: value[key] for key, field in _KEYS.items()},
        tied=bool(value.get("tied", False)),
        model_type=value.get("modelType", ""),
        biased=bool(value.get("biased", False)),
        head_dim=value.get("headDim", 0),
    )


def _problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with one entry, as sentences."""
    if not isinstance(value, Mapping):
        yield f"models.{name} must be an object with {', '.join(_KEYS)}, is {value!r}"
        return
    for key in _KEYS:
        if not _is_size(value.get(key)):
            yield f"models.{name}.{key} must be a whole number of at least 1, is {value.get(key)!r}"
    for key in value:
        if key not in (*_KEYS, *_OPTIONAL):
            yield f"models.{name} has no {key}: it takes {', '.join((*_KEYS, *_OPTIONAL[:-1]))} and {_OPTIONAL[-1]}"
    for key in ("tied", "biased"):
        if not isinstance(value.get(key, False), bool):
            yield f"models.{name}.{key} must be true or false, is {value[key]!r}"
    if not _is_size(value.get("headDim", 1)):
        yield f"models.{name}.headDim must be a whole number of at least 1, is {value['headDim']!r}"
    if not isinstance(value.get("modelType", ""), str):
        yield f"models.{name}.modelType must be config.json's model_type, is {value['modelType']!r}"
    heads, kv_heads, hidden = (value.get(key) for key in ("heads", "kvHeads", "hiddenSize"))
    if _is_size(heads) and _is_size(kv_heads) and heads % kv_heads:
        yield f"models.{name}.heads must be a multiple of kvHeads, {heads} is none of {kv_heads}"
    if _is_size(heads) and _is_size(hidden) and hidden < heads:
        yield f"models.{name}.hiddenSize must be at least heads, {hidden} is less than {heads}"


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
