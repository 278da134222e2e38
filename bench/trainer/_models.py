"""What the benchmarks of merge and consolidate share: models of random weights, and one process measured."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan
from finetune_trainer.tensor_dtypes import encode, round_in_place

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

PEAK = """
import re
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
"""Peak resident kB of the process itself; getrusage would count the benchmark's own memory at the fork."""


@dataclass(frozen=True)
class Taken:
    """One run: wall seconds, processor seconds (user and system), peak resident MB where the program tells it."""

    seconds: float
    processor: float
    peak_mb: float


def layers_of(gigabytes: float, item_bytes: int = 2) -> int:
    """How many layers make a model of about that size."""
    per_layer = item_bytes * sum(rows * columns for rows, columns in LAYER_SHAPES.values())
    return max(1, round((gigabytes * 1e9 - 2 * item_bytes * VOCABULARY * HIDDEN) / per_layer))


def model_plan(layers: int, dtype: str) -> list[TensorPlan]:
    """The tensors of a Llama of `layers` layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
        shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return [TensorPlan(name, dtype, shape) for name, shape in shapes.items()]


def write_model(folder: Path, layers: int, dtype: str = "BF16", shards: int = 4) -> int:
    """A Llama of random weights in `shards` files with their index; returns its bytes."""
    folder.mkdir(exist_ok=True)
    plan = model_plan(layers, dtype)
    random = np.random.default_rng(0)
    weight_map = {}
    size = -(-len(plan) // shards)
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = plan[number * size : (number + 1) * size]
        with SafetensorsWriter(folder / name, part, {"format": "pt"}) as writer:
            for tensor in part:
                values = random.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
                round_in_place(values, dtype)
                writer.write(tensor.name, [encode(values, dtype)])
                weight_map[tensor.name] = name
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


def run(command: Sequence[str | Path]) -> Taken:
    """Run a process that must succeed and whose last word of output, if any, is its peak memory in kB."""
    started = time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the merge stage sets it; torch does not read it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    output, errors = process.stdout, process.stderr
    printed = output.read().split() if output else []
    said = errors.read() if errors else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.stderr.write(said)
        raise SystemExit(f"{command[:2]} ended with {process.returncode}")
    peak = int(printed[-1]) / 1024 if printed else 0.0
    return Taken(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak)


@dataclass(frozen=True)
class Figures:
    """Of each contender: median seconds, median processor seconds, and the most memory in MB (not of cp)."""

    seconds: Mapping[str, float]
    processor: Mapping[str, float]
    memory: Mapping[str, float]


def alternate(contenders: Mapping[str, Sequence[str | Path]], rounds: int, output: Path) -> Figures:
    """Run every contender once a round, by turns; each leaves the folder `output`, which is removed after it."""
    runs: dict[str, list[Taken]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, command in contenders.items():
            taken = run(command)
            runs[name].append(taken)
            shutil.rmtree(output)
            os.sync()
            print(f"round {number + 1} {name}: {taken}", flush=True)
    return Figures(
        {name: statistics.median(taken.seconds for taken in some) for name, some in runs.items()},
        {name: statistics.median(taken.processor for taken in some) for name, some in runs.items()},
        {name: max(taken.peak_mb for taken in some) for name, some in runs.items() if name != "cp"},
    )
