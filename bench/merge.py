"""Merge of a LoRA adapter against `cp` of the same files and against peft's merge_and_unload, alternating in one run.

    python bench/merge.py [--gigabytes 1.0] [--rounds 3] [--modules q_proj,v_proj] [--no-peft] [--folder DIR]

Each contender is a fresh process, imports included, and ends with its files fsynced. The last line is JSON: median
seconds, peak memory and ratios; processor seconds tell more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan
from finetune_trainer.tensor_dtypes import encode, round_in_place

HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 2048, 5632, 32000, 16
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}

OURS = """
import sys
from pathlib import Path
from finetune_trainer.cpus import available_cpus
from finetune_trainer.merging import merge, plan_merge
from finetune_trainer.model_files import read_model_files
base, adapter, output = map(Path, sys.argv[1:])
output.mkdir()
merge(plan_merge(read_model_files(base), adapter), output, {}, available_cpus())
"""
PEAK = """
import re
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""
"""Peak resident kB of the process itself; getrusage would count the benchmark's own memory at the fork."""
PEFT = """
import os, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
for path in Path(output).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
"""


def write_model(folder: Path, layers: int) -> int:
    """A Llama of `layers` layers with random bfloat16 weights; returns its bytes."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
        shapes |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    plan = [TensorPlan(name, "BF16", shape) for name, shape in shapes.items()]
    random = np.random.default_rng(0)
    with SafetensorsWriter(folder / "model.safetensors", plan, {"format": "pt"}) as writer:
        for tensor in plan:
            values = random.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
            round_in_place(values, "BF16")
            writer.write(tensor.name, [encode(values, "BF16")])
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
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def write_adapter(folder: Path, layers: int, modules: list[str]) -> None:
    """A float32 adapter of rank RANK on the modules whose last component is listed."""
    folder.mkdir()
    plan = []
    for layer in range(layers):
        for name, (outputs, inputs) in LAYER_SHAPES.items():
            if name.rsplit(".", 1)[-1] in modules:
                key = f"base_model.model.model.layers.{layer}.{name}"
                plan.append(TensorPlan(f"{key}.lora_A.weight", "F32", (RANK, inputs)))
                plan.append(TensorPlan(f"{key}.lora_B.weight", "F32", (outputs, RANK)))
    random = np.random.default_rng(1)
    with SafetensorsWriter(folder / "adapter_model.safetensors", plan, {"format": "pt"}) as writer:
        for tensor in plan:
            values = random.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
            writer.write(tensor.name, [values.tobytes()])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Taken:
    """One run: wall seconds, processor seconds (user and system), peak resident MB where the program tells it."""

    seconds: float
    processor: float
    peak_mb: float


def run(command: list[str | Path]) -> Taken:
    """Run a process that must succeed and whose last line of output, if any, is its peak memory in kB."""
    started = time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the merge stage sets it; torch does not read it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    printed = process.stdout.read().split() if process.stdout else []
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:2]} ended with {process.returncode}")
    peak = int(printed[-1]) / 1024 if printed else 0.0
    return Taken(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modules", default="q_proj,v_proj")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default is a temporary folder")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=arguments.folder))
    try:
        print(json.dumps(measure(scratch, arguments)))
    finally:
        shutil.rmtree(scratch)


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    base, adapter, output = scratch / "base", scratch / "adapter", scratch / "output"
    per_layer = 2 * sum(rows * columns for rows, columns in LAYER_SHAPES.values())
    layers = max(1, round((arguments.gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    size = write_model(base, layers)
    write_adapter(adapter, layers, arguments.modules.split(","))
    print(f"base of {size / 1e9:.2f} GB, {layers} layers, rank {RANK} on {arguments.modules}", flush=True)
    contenders: dict[str, list[str | Path]] = {
        "cp": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', base, output],
        "ours": [sys.executable, "-c", OURS + PEAK, base, adapter, output],
    }
    if not arguments.no_peft:
        contenders["peft"] = [sys.executable, "-c", PEFT + PEAK, base, adapter, output]
    runs: dict[str, list[Taken]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name, command in contenders.items():
            taken = run(command)
            runs[name].append(taken)
            shutil.rmtree(output)
            os.sync()
            print(f"round {number + 1} {name}: {taken}", flush=True)
    seconds = {name: statistics.median(taken.seconds for taken in some) for name, some in runs.items()}
    processor = {name: statistics.median(taken.processor for taken in some) for name, some in runs.items()}
    memory = {name: max(taken.peak_mb for taken in some) for name, some in runs.items() if name != "cp"}
    result: dict[str, Any] = {
        "gigabytes": round(size / 1e9, 3),
        "modules": arguments.modules,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "processor_seconds": {name: round(value, 2) for name, value in processor.items()},
        "peak_mb": {name: round(value) for name, value in memory.items()},
        "merge_rate_to_cp": round(seconds["cp"] / seconds["ours"], 3),
    }
    if not arguments.no_peft:
        result["merge_peft_time_ratio"] = round(seconds["peft"] / seconds["ours"], 2)
        result["merge_peft_memory_ratio"] = round(memory["peft"] / memory["ours"], 2)
    return result


if __name__ == "__main__":
    main()
