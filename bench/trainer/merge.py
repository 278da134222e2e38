"""Merge of a LoRA adapter against `cp` of the same files and against peft's merge_and_unload, by turns in one run.

    .venv-bench/bin/python bench/trainer/merge.py [--gigabytes 2.2] [--rounds 3] [--modules q_proj,v_proj] [--no-peft]

Each contender is a fresh process, imports included, and ends with its files on the disk (fsynced). `ours` is
`finetune-trainer merge-adapter`: its output is hashed, and rows of every changed tensor are read back and computed
again. `verified` is the merge stage's: the base's digests are known, and what is read is hashed too. The last line is
JSON: median seconds, peak memory and ratios; processor seconds tell more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _models import LAYER_SHAPES, PEAK, alternate, layers_of, run, write_model

from finetune_trainer.safetensors_stream import SafetensorsWriter, TensorPlan

RANK = 16

OURS = """
import sys
from pathlib import Path
from finetune_trainer.merge_adapter import run
base, adapter, output, _ = map(Path, sys.argv[1:])
run(base, adapter, output, "base", "5GB")
"""
VERIFIED = """
import json, sys
from pathlib import Path
from finetune_trainer.artifacts import new_artifact
from finetune_trainer.cpus import available_cpus
from finetune_trainer.merged_model import write_merged_model
from finetune_trainer.merging import plan_merge
from finetune_trainer.model_files import read_model_files
base, adapter, output, digests = map(Path, sys.argv[1:])
with new_artifact(output, "merge") as writer:
    plan = plan_merge(read_model_files(base), adapter)
    write_merged_model(plan, writer, output, json.loads(digests.read_text()), available_cpus())
"""
PEFT = """
import os, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output, _ = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
for path in Path(output).iterdir():
    with path.open("rb") as file:
        os.fsync(file.fileno())
"""
DIGESTS = """
import json, sys
from pathlib import Path
from finetune_trainer.artifacts import hash_file
base, _, _, digests = map(Path, sys.argv[1:])
digests.write_text(json.dumps({path.name: hash_file(path) for path in base.glob("*.safetensors")}))
"""


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


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    layers = layers_of(arguments.gigabytes)
    paths = [scratch / name for name in ("base", "adapter", "output", "digests.json")]
    base, adapter, output, _ = paths
    size = write_model(base, layers)
    write_adapter(adapter, layers, arguments.modules.split(","))
    run([sys.executable, "-c", DIGESTS, *paths])  # all of the base is in the page cache now, for every contender
    print(f"base of {size / 1e9:.2f} GB, {layers} layers, rank {RANK} on {arguments.modules}", flush=True)
    contenders: dict[str, list[str | Path]] = {
        "cp": ["sh", "-c", 'cp -r "$0" "$2" && sync "$2"/*', *paths],
        "ours": [sys.executable, "-c", OURS + PEAK, *paths],
        "verified": [sys.executable, "-c", VERIFIED + PEAK, *paths],
    }
    if not arguments.no_peft:
        contenders["peft"] = [sys.executable, "-c", PEFT + PEAK, *paths]
    found = alternate(contenders, arguments.rounds, output)
    seconds, processor, memory = found.seconds, found.processor, found.memory
    result: dict[str, Any] = {
        "merge_gigabytes": round(size / 1e9, 3),
        "merge_modules": arguments.modules,
        "merge_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "merge_processor_seconds": {name: round(value, 2) for name, value in processor.items()},
        "merge_peak_mb": {name: round(value) for name, value in memory.items()},
        "merge_rate_to_cp": round(seconds["cp"] / seconds["ours"], 3),
        "merge_verified_rate_to_cp": round(seconds["cp"] / seconds["verified"], 3),
    }
    if not arguments.no_peft:
        result["merge_peft_time_ratio"] = round(seconds["peft"] / seconds["ours"], 2)
        result["merge_peft_memory_ratio"] = round(memory["peft"] / memory["ours"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
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


if __name__ == "__main__":
    main()
