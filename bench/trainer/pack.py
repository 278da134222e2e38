"""Packing tokenised documents into rows, against TRL's bfd, by turns in one run.

    .venv-bench/bin/python bench/trainer/pack.py [--rounds 5]

Both begin with the documents tokenised (ours in a spool, TRL's in an Arrow table) and end with the rows in memory: ours
as tokens, labels, positions and segments, padded; TRL's as tokens, mask and lengths. What our rows take on the way to a
file that is hashed and fsynced, as prepare writes it, is told beside it. The last line is JSON. `pack_time_to_trl` is
our seconds over TRL's, medians, for 100,000 documents of gamma lengths in rows of 256; `pack_fill` is the share of
positions that hold a token there. The same stands for 15,000 documents as long as dolly's in rows of 1024. TRL cuts
what is longer than a row without a word; ours is given what fits, since prepare names the rest.
`pack_million_seconds` is for deciding the rows of 1,000,000 documents, the slowest round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.artifacts import new_artifact
from finetune_trainer.packing import BEST_FIT, pack_documents
from finetune_trainer.rows import ROWS_FILE, TENSORS, gather_rows, write_rows
from finetune_trainer.spool import DocumentSpool

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """Documents of some lengths, in tokens, and the length of the rows that they go into."""

    name: str
    lengths: Lengths
    row_length: int


@dataclass(frozen=True)
class Packed:
    """What one run gave: wall seconds to the rows in memory, rows, and tokens in them.

    `decide_seconds` of them say which document stands where; `file_seconds` are for the same rows in a file. Of TRL
    neither is known.
    """

    seconds: float
    rows: int
    tokens: int
    decide_seconds: float = 0.0
    file_seconds: float = 0.0


def gamma_lengths(count: int, shape: float, scale: float, least: int, most: int) -> Lengths:
    """Seeded lengths: `least` on top of a gamma distribution, none above `most`."""
    values = np.random.RandomState(0).gamma(shape, scale, count).astype(np.int64) + least
    return np.minimum(values, most)


def dolly_lengths(count: int) -> Lengths:
    """As long as databricks-dolly-15k's records with their prompts: 220 tokens on average, one in 200 above 1024."""
    return gamma_lengths(count, 1.2, 170, 20, 1 << 20)


def documents(lengths: Lengths) -> list[npt.NDArray[np.int32]]:
    tokens = np.random.RandomState(1).randint(0, 32000, int(lengths.sum())).astype(np.int32)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def ours(case: Case, contents: list[npt.NDArray[np.int32]], folder: Path) -> Callable[[], Packed]:
    spool = DocumentSpool(folder)
    for tokens in contents:
        if len(tokens) <= case.row_length:
            spool.add(tokens.tolist(), [(1 + len(tokens) // 2, len(tokens))] if len(tokens) > 1 else [])
    spool.commit()
    number = iter(range(1000))

    def run() -> Packed:
        began = time.perf_counter()
        packed = pack_documents(BEST_FIT, spool.lengths, case.row_length)
        decided = time.perf_counter()
        rows = {
            name: np.concatenate(list(gather_rows(name, spool, packed, row_length=case.row_length, pad=0)))
            for name in TENSORS
        }
        gathered = time.perf_counter()
        with new_artifact(folder / f"{case.name}-{next(number)}", "prepare") as writer:
            write_rows(writer, ROWS_FILE, spool, packed, row_length=case.row_length, pad=0)
        written = time.perf_counter()
        tokens = int((rows["segment_ids"] > 0).sum())
        return Packed(gathered - began, len(packed), tokens, decided - began, written - gathered)

    return run


def trl_bfd(case: Case, contents: list[npt.NDArray[np.int32]]) -> Callable[[], Packed]:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    masks = [(np.arange(len(tokens)) > len(tokens) // 2).astype(np.int8) for tokens in contents]
    table = datasets.Dataset.from_dict({"input_ids": contents, "completion_mask": masks})

    def run() -> Packed:
        began = time.perf_counter()
        packed = pack_dataset(table, case.row_length, "bfd")
        seconds = time.perf_counter() - began
        lengths = packed.with_format("arrow")[:]["seq_lengths"]
        tokens = sum(chunk.flatten().to_numpy().sum() for chunk in lengths.chunks)
        return Packed(seconds, len(packed), int(tokens))

    return run


def compare(case: Case, rounds: int) -> dict[str, Any]:
    contents = documents(case.lengths)
    with tempfile.TemporaryDirectory(prefix="bench-pack-") as folder:
        arms = {"ours": ours(case, contents, Path(folder)), "trl": trl_bfd(case, contents)}
        runs: dict[str, list[Packed]] = {name: [] for name in arms}
        for number in range(rounds):
            for name, arm in arms.items():
                runs[name].append(arm())
                print(f"{case.name} round {number + 1} {name}: {runs[name][-1]}", flush=True)
    seconds = {name: statistics.median(run.seconds for run in some) for name, some in runs.items()}
    last = {name: some[-1] for name, some in runs.items()}
    given = int(case.lengths.sum())
    return {
        "documents": len(case.lengths),
        "row_length": case.row_length,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "decide_seconds": round(statistics.median(run.decide_seconds for run in runs["ours"]), 4),
        "file_seconds": round(statistics.median(run.file_seconds for run in runs["ours"]), 4),
        "fill": {name: round(run.tokens / (run.rows * case.row_length), 5) for name, run in last.items()},
        "tokens_cut_by_trl": given - last["trl"].tokens,
        "documents_named_as_too_long": int((case.lengths > case.row_length).sum()),
        "time_to_trl": round(seconds["ours"] / seconds["trl"], 4),
    }


def million(rounds: int) -> tuple[float, float]:
    """(seconds, fill) of deciding the rows of 1,000,000 documents, the slowest of `rounds`."""
    lengths = gamma_lengths(1_000_000, 2, 60, 1, 256)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        packed = pack_documents(BEST_FIT, lengths, 256)
        seconds.append(time.perf_counter() - began)
    return max(seconds), packed.tokens / (len(packed) * 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
    gamma = compare(Case("gamma", gamma_lengths(100_000, 2, 60, 1, 256), 256), rounds)
    dolly = compare(Case("dolly", dolly_lengths(15_000), 1024), rounds)
    seconds, fill = million(rounds)
    result = {
        "pack_fill": gamma["fill"]["ours"],
        "pack_fill_dolly": dolly["fill"]["ours"],
        "pack_time_to_trl": gamma["time_to_trl"],
        "pack_million_seconds": round(seconds, 3),
        "pack_million_fill": round(fill, 5),
        "pack_gamma": gamma,
        "pack_dolly": dolly,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
