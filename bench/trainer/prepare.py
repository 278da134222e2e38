"""prepare against the bare tokenizers library and against TRL's preparation, by turns in one run.

    .venv-bench/bin/python bench/trainer/prepare.py [--rounds 5] [--records 15000]

15,000 records like dolly's, 3 million tokens, one byte-level BPE tokenizer for all. Ours is the whole stage, from the
JSON Lines file to the artifact with packed rows, less what the same stage takes for one record (tokenizer and model
folder are there already, as they are for the others). Raw is tokenizers' encode_batch_fast on strings that are ready, a
thousand at a time, and keeps nothing. TRL is SFTTrainer's own preparation with packing, from a table of prompts and
completions in memory; once for a table it tokenises record by record, which is all that its trainer does.
The last line is JSON: `prepare_to_raw_tokenizers` is raw's seconds over ours, medians of the rounds (1 means as fast,
TRL's is told beside it). Processor seconds tell more on a busy machine: `prepare_processor_to_raw` is from them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetune_trainer.artifacts import remove_artifact
from finetune_trainer.contract import StageConfig
from finetune_trainer.formats import open_format

MAX_LENGTH = 1024
BATCH = 1000


@dataclass(frozen=True)
class Taken:
    """Wall and processor seconds of one run; `tokens` where the arm counts them."""

    seconds: float
    processor: float
    tokens: int = 0


def timed(work: Callable[[], int]) -> Taken:
    wall, processor = time.perf_counter(), time.process_time()
    tokens = work()
    return Taken(time.perf_counter() - wall, time.process_time() - processor, tokens)


class Words:
    """Seeded text of made-up words with the frequencies of a natural language (Zipf)."""

    def __init__(self) -> None:
        self._random = np.random.RandomState(0)
        syllables = [
            first + vowel + last
            for first in "bcdfghklmnprstvw"
            for vowel in "aeiou"
            for last in ["", "n", "r", "s", "t"]
        ]
        counts = self._random.randint(1, 4, 30_000)
        self._words = ["".join(self._random.choice(syllables, count)) for count in counts]
        self._cumulated = np.cumsum(1.0 / np.arange(1, len(self._words) + 1))

    def text(self, count: int) -> str:
        numbers = np.searchsorted(self._cumulated, self._random.random_sample(count) * self._cumulated[-1])
        words = [self._words[number] for number in numbers]
        sentences = []
        while words:
            size = int(self._random.randint(5, 20))
            sentences.append(", ".join([" ".join(words[: size // 2 or 1]), " ".join(words[size // 2 or 1 : size])]))
            words = words[size:]
        return ". ".join(sentence.capitalize() for sentence in sentences) + "."


def records(count: int) -> list[dict[str, str]]:
    words, random = Words(), np.random.RandomState(1)
    found = []
    for _ in range(count):
        context = words.text(min(330, int(random.gamma(2, 75)) + 5)) if random.random_sample() < 0.3 else ""
        response = words.text(min(330, int(random.gamma(1.1, 70)) + 3))
        found.append({"instruction": words.text(int(random.randint(5, 25))), "context": context, "response": response})
    return found


def write_model(folder: Path, texts: list[str]) -> None:
    """A model folder with a tokenizer like Llama 3's or BLOOM's, trained on `texts`; prepare looks at no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **model}))
    # An artifact of a model has weights: no byte of them is read here.
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def stage(workspace: Path, data: str) -> Callable[[], int]:
    """The stage prepare on the records of the folder `data`."""
    from finetune_trainer.stages import prepare

    config = StageConfig(
        stage="prepare",
        image="bench",
        spec={
            "model": {"source": "workspace:///base"},
            "dataset": {"source": f"workspace:///{data}", "format": "dolly", "maxLength": MAX_LENGTH},
            "training": {"epochs": 1, "seed": 42},
        },
        output=f"finetune/jobs/bench/{data}/prepare-0",
        parallelism={"globalBatchSize": 8},
        workspace=str(workspace),
    )

    def run() -> int:
        remove_artifact(config.output_path)
        with contextlib.redirect_stdout(io.StringIO()):
            return int(prepare.run(config).metrics["tokens"])

    return run


def raw(tokenizer: Any, texts: list[str]) -> Callable[[], int]:
    def run() -> int:
        return sum(
            sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH]))
            for start in range(0, len(texts), BATCH)
        )

    return run


def trl_preparation(tokenizer: Any, spans: list[list[str]], folder: Path) -> Callable[[], int]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    table = datasets.Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in spans])
    settings = SFTConfig(output_dir=str(folder), packing=True, max_length=MAX_LENGTH, use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_is_vlm=False)

    def run() -> int:
        packed = SFTTrainer._prepare_dataset(trainer, table, tokenizer, settings, True, None, "train")
        return sum(map(len, packed["input_ids"]))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=15_000)
    parser.add_argument("--no-trl", action="store_true")
    arguments = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "true"})
    os.environ.setdefault("USE_TORCH", "0" if arguments.no_trl else "1")
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as scratch:
        print(json.dumps(measure(Path(scratch), arguments)))


def measure(workspace: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from finetune_trainer.tokenization import load_tokenizer

    some = records(arguments.records)
    dolly = open_format("dolly")
    spans = [[span.text for span in dolly.example(record).spans] for record in some]
    texts = ["".join(parts) for parts in spans]
    write_model(workspace / "base", texts[:3000])
    for name, part in (("all", some), ("one", some[:1])):
        (workspace / name).mkdir()
        (workspace / name / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    tokenizer = load_tokenizer(workspace / "base")
    arms = {
        "raw": raw(tokenizer.backend_tokenizer, texts),
        "ours": stage(workspace, "all"),
        "start": stage(workspace, "one"),
    }
    if not arguments.no_trl:
        arms["trl"] = trl_preparation(tokenizer, spans, workspace / "trl")
    runs: dict[str, list[Taken]] = {name: [] for name in arms}
    for number in range(arguments.rounds + 1):
        for name, work in arms.items():
            taken = timed(work)
            print(f"round {number} {name}: {taken}", flush=True)
            if number:  # round 0 fetches model and dataset, and fills caches
                runs[name].append(taken)
    seconds = {name: statistics.median(taken.seconds for taken in some) for name, some in runs.items()}
    processor = {name: statistics.median(taken.processor for taken in some) for name, some in runs.items()}
    result = {
        "prepare_to_raw_tokenizers": round(seconds["raw"] / (seconds["ours"] - seconds["start"]), 3),
        "prepare_processor_to_raw": round(processor["raw"] / (processor["ours"] - processor["start"]), 3),
        "prepare_records": arguments.records,
        "prepare_tokens": runs["ours"][-1].tokens,
        "prepare_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "prepare_processor_seconds": {name: round(value, 3) for name, value in processor.items()},
        "prepare_raw_tokens_per_second": round(runs["raw"][-1].tokens / seconds["raw"]),
    }
    if not arguments.no_trl:
        result["prepare_trl_to_raw_tokenizers"] = round(seconds["raw"] / seconds["trl"], 3)
    return result


if __name__ == "__main__":
    main()
