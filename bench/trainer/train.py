"""Training, by turns in one process: our loop, TRL's SFTTrainer, transformers' Trainer; and LoRA against full, ours.

    .venv-bench/bin/python bench/trainer/train.py [--rounds 4] [--steps 16] [--threads N] [--workloads full,ragged]

A Llama of 4 million parameters, float32, rows of 128 tokens, 8 a step, LoRA of rank 16 on q_proj and v_proj, no
dropout, AdamW. All three start from the same adapter and see the same rows in the same order; first a run of each
proves that their losses are the same step for step, then each takes its turn in each round, and times of a round are
compared with each other. Timed is what comes between the ends of the third and the last step: rows, passes, optimizer,
log.

The workload `full` has 128 tokens in each row, all of them supervised; `ragged` has lengths as instructions have,
padded to the longest of the batch by each of the three, and supervises the second half. Packed rows cannot be compared:
TRL's packing needs flash attention, or its documents see each other.

The last line is JSON. `train_to_trl` and `train_to_transformers` are our tokens a second over theirs, the lower of the
workloads; `lora_to_full` is samples a second of LoRA over full fine-tuning, rows of `full`. The same with
`_by_processor` are ratios of processor seconds, which say more on a machine that is busy with other things.
"""

# ruff: noqa: E402 - what libraries read from the environment must be there before they are imported
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import datasets
import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl

from finetune_trainer import training
from finetune_trainer.backends import IGNORED, ModelPlan
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows
from finetune_trainer.progress import Progress, ProgressPoster
from finetune_trainer.training_log import LOG_NAME

LENGTH, BATCH, RANK = 128, 8, 16
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 4, 256, 688, 8, 4, 2048
LEARNING_RATE, WEIGHT_DECAY, SEED = 1e-3, 0.01, 7
TARGETS = ["q_proj", "v_proj"]
LORA = {
    "type": "lora",
    "quantization": "none",
    "lora": {"rank": RANK, "alpha": RANK, "dropout": 0.0, "targetModules": TARGETS, "variant": "standard"},
}
FULL = {"type": "full", "quantization": "none"}
WARM_STEPS = 3
PARITY_STEPS = 12
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of a step's loss: float32 sums in another order, over a few steps."""
ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"


class Taken(NamedTuple):
    """Seconds of one run."""

    wall: float
    processor: float


@dataclass
class Arm:
    """What one run of one trainer left: (wall, processor) seconds at the end of each step, and the loss of each."""

    ended: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def end_step(self) -> None:
        self.ended.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> Taken:
        """From the end of the last warm step to the end of the last."""
        first, last = self.ended[WARM_STEPS - 1], self.ended[-1]
        return Taken(last[0] - first[0], last[1] - first[1])


def write_model(folder: Path) -> int:
    """The base model; returns its number of parameters."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_rows(workload: str, steps: int) -> PreparedRows:
    """Rows of one document each for `steps` steps, read in a seeded order."""
    random = np.random.default_rng(SEED)
    count = steps * BATCH
    lengths = np.full(count, LENGTH)
    if workload == "ragged":
        lengths = np.clip(random.lognormal(math.log(60), 0.5, count).astype(int), 12, LENGTH)
    place = np.arange(LENGTH)[None, :]
    real = place < lengths[:, None]
    ids = np.where(real, random.integers(3, VOCABULARY, (count, LENGTH)), 0).astype(np.int32)
    # The first token is no target: transformers divides by all labels, ours by those that something predicts.
    supervised = real & (place >= np.where(workload == "ragged", lengths // 2, 1)[:, None])
    return PreparedRows(
        input_ids=ids,
        labels=np.where(supervised, ids, IGNORED).astype(np.int32),
        position_ids=np.where(real, place, 0).astype(np.int32),
        segment_ids=real.astype(np.int32),
        order=random.permutation(count).astype(np.int32),
        max_steps=steps,
        global_batch_size=BATCH,
    )


def as_dataset(rows: PreparedRows) -> Any:
    """The same rows in the order in which ours reads them, without padding."""
    records = []
    for row in rows.order:
        length = int((rows.segment_ids[row] != 0).sum())
        records.append(
            {"input_ids": rows.input_ids[row, :length].tolist(), "labels": rows.labels[row, :length].tolist()}
        )
    return datasets.Dataset.from_list(records)


class Stamped(Progress):
    """Progress of a training that nobody follows, with the moment of each step's end."""

    def __init__(self, steps: int, arm: Arm) -> None:
        super().__init__(ProgressPoster({}), steps)
        self._arm = arm

    def stepped(self, step: int) -> None:
        super().stepped(step)
        self._arm.end_step()

    def logged(self, *arguments: Any) -> None:
        super().logged(*arguments)
        self._arm.end_step()


def run_ours(folder: Path, rows: PreparedRows, every: int, method: dict[str, Any] = LORA) -> Arm:
    """Our loop, logging every so many steps; the checkpoint at its end is not timed."""
    arm = Arm()
    backend = TorchBackend(ACCELERATOR)
    backend.start()
    backend.build(
        ModelPlan(
            folder=folder / "model",
            method=method,
            precision="fp32",
            weight_decay=WEIGHT_DECAY,
            seed=SEED,
            keep_masks=False,
        )
    )
    plan = training.TrainingPlan(
        total_steps=rows.max_steps,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        schedule="linear",
        warmup_steps=0,
        max_gradient_norm=1.0,
        seed=SEED,
        precision="fp32",
        checkpoint_every_steps=rows.max_steps,
        keep_checkpoints=1,
        log_every_steps=every,
        identity={},
    )
    work = folder / "work"
    training.train(backend, plan, rows, work, None, Stamped(rows.max_steps, arm), should_stop=lambda: False)
    arm.losses = [json.loads(line)["loss"] for line in (work / LOG_NAME).read_text().splitlines()]
    shutil.rmtree(work)
    return arm


def adapted_model(folder: Path) -> Any:
    """The model as a user of peft makes it, with the adapter's start that ours has."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.config.use_cache = False
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS, bias="none"
    )
    torch.manual_seed(SEED)
    return peft.get_peft_model(model, config)


def make_tokenizer() -> Any:
    """SFTTrainer asks for one although nothing is tokenised."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def common_arguments(folder: Path, steps: int, every: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "logging_steps": every,
        "save_strategy": "no",
        "report_to": [],
        "seed": SEED,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": ACCELERATOR == "cpu",
        "dataloader_pin_memory": ACCELERATOR == "cuda",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


class Ends(transformers.TrainerCallback):  # type: ignore[misc]
    """The moment of each step's end, after what other callbacks do at it."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._arm.end_step()


def in_order(kind: type[Any], arm: Arm) -> type[Any]:
    """The trainer class with rows in the dataset's order, which has been shuffled, and each step's loss kept."""

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            arm.losses.append(loss)
            return loss

    return InOrder


def run_trl(folder: Path, rows: PreparedRows, every: int) -> Arm:
    arm = Arm()
    arguments = trl.SFTConfig(
        **common_arguments(folder, rows.max_steps, every),
        packing=False,
        max_length=LENGTH,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = in_order(trl.SFTTrainer, arm)(
        model=adapted_model(folder),
        args=arguments,
        train_dataset=as_dataset(rows),
        processing_class=make_tokenizer(),
        callbacks=[Ends(arm)],
    )
    return finish(trainer, arm)


def run_transformers(folder: Path, rows: PreparedRows, every: int) -> Arm:
    arm = Arm()
    tokenizer = make_tokenizer()
    trainer = in_order(transformers.Trainer, arm)(
        model=adapted_model(folder),
        args=transformers.TrainingArguments(**common_arguments(folder, rows.max_steps, every)),
        train_dataset=as_dataset(rows),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Ends(arm)],
    )
    return finish(trainer, arm)


def finish(trainer: Any, arm: Arm) -> Arm:
    trainer.train()
    arm.losses = [float(loss) for loss in arm.losses]
    return arm


def prove_equal(folder: Path, workload: str) -> dict[str, float]:
    """The largest relative difference of a step's loss from ours, by contender; SystemExit where it is too large."""
    rows = make_rows(workload, PARITY_STEPS)
    ours = run_ours(folder, rows, 1).losses
    found = {}
    for name, run in (("trl", run_trl), ("transformers", run_transformers)):
        theirs = run(folder, rows, 1).losses
        found[name] = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if not found[name] <= LOSS_TOLERANCE:
            raise SystemExit(f"{workload}: losses of ours {ours} and {name} {theirs} are not the same")
    print(f"{workload}: losses over {PARITY_STEPS} steps differ by at most {found}", flush=True)
    return found


def ratios(numerators: list[Taken], denominators: list[Taken]) -> tuple[float, float]:
    """Medians of the ratios of times taken in the same round: wall, processor."""
    pairs = list(zip(numerators, denominators, strict=True))
    return statistics.median(a.wall / b.wall for a, b in pairs), statistics.median(
        a.processor / b.processor for a, b in pairs
    )


def take_turns(runs: dict[str, Callable[[], Arm]], rounds: int, what: str) -> dict[str, list[Taken]]:
    """Times of each contender in each round; the order turns from round to round."""
    seconds: dict[str, list[Taken]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            seconds[name].append(runs[name]().seconds())
        shown = ", ".join(f"{name} {some[-1].wall:.2f} ({some[-1].processor:.2f})" for name, some in seconds.items())
        print(f"{what}, round {number + 1}: {shown} s (of processor)", flush=True)
    return seconds


def rates(amount: int, seconds: dict[str, list[Taken]]) -> dict[str, float]:
    return {name: round(amount / statistics.median(taken.wall for taken in some), 2) for name, some in seconds.items()}


def compare_trainers(folder: Path, workload: str, rounds: int, steps: int) -> dict[str, Any]:
    rows = make_rows(workload, steps)
    contenders = {"ours": run_ours, "trl": run_trl, "transformers": run_transformers}
    seconds = take_turns({name: partial(run, folder, rows, 10) for name, run in contenders.items()}, rounds, workload)
    tokens = sum(rows.counts(step).tokens for step in range(WARM_STEPS, steps))
    return {
        "tokens_per_second": rates(tokens, seconds),
        "to_trl": ratios(seconds["trl"], seconds["ours"]),
        "to_transformers": ratios(seconds["transformers"], seconds["ours"]),
    }


def compare_methods(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """LoRA against full fine-tuning in our loop."""
    rows = make_rows("full", steps)
    methods = {"lora": LORA, "full": FULL}
    runs = {name: partial(run_ours, folder, rows, 10, method) for name, method in methods.items()}
    seconds = take_turns(runs, rounds, "methods")
    wall, processor = ratios(seconds["full"], seconds["lora"])
    return {
        "samples_per_second": rates((steps - WARM_STEPS) * BATCH, seconds),
        "lora_to_full": round(wall, 3),
        "lora_to_full_by_processor": round(processor, 3),
    }


def lowest(workloads: dict[str, dict[str, Any]], field: str) -> dict[str, float]:
    """The lower of the workloads' ratios, by wall and by processor seconds."""
    wall, processor = (min(found[field][place] for found in workloads.values()) for place in (0, 1))
    return {f"train_{field}": round(wall, 3), f"train_{field}_by_processor": round(processor, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="of each run, the first three untimed")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is one a processor")
    parser.add_argument("--workloads", default="full,ragged")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp(prefix="bench-train-"))
    try:
        parameters = write_model(folder / "model")
        where = f"{torch.get_num_threads()} threads" if ACCELERATOR == "cpu" else torch.cuda.get_device_name()
        print(f"{parameters:,} parameters, {where}", flush=True)
        workloads = {
            name: {
                "loss_difference": prove_equal(folder, name),
                **compare_trainers(folder, name, arguments.rounds, arguments.steps),
            }
            for name in arguments.workloads.split(",")
        }
        result = {
            "device": where,
            "workloads": workloads,
            **lowest(workloads, "to_trl"),
            **lowest(workloads, "to_transformers"),
            **compare_methods(folder, arguments.rounds, arguments.steps),
        }
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
