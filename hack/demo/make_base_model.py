"""Makes the demo's sources in a folder: a small base model of the Llama architecture, its tokenizer, and the dataset.

The Job demo-sources runs this in the trainer image, with the script and its inputs in a ConfigMap; it needs nothing but
the trainer's own dependencies and no network. A download of a real model is what it stands in for, so the folder has
the hub's layout. The model learns English and the prompt's form from base-text.txt, never an answer of the dataset: its
own answers are sentences of that text. Equal inputs on one machine and one torch give equal bytes.

    python make_base_model.py --dataset finetune-faq.jsonl --text base-text.txt --output /workspace/sources
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL_FOLDER = "tiny-llama"
RECORD_NAME = "made-from.json"

VOCABULARY = 1024
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 384
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
MAX_POSITIONS = 512
INITIALIZER_RANGE = 0.1
"""Wide for a model this narrow: embeddings and output share one matrix, and its rows decide how sure a score can be."""

STEPS = 60
ROWS = 16
ROW_LENGTH = 128
LEARNING_RATE = 1e-2
WARMUP_STEPS = 10
SEED = 7

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="records in dolly's schema, JSON Lines")
    parser.add_argument("--text", type=Path, required=True, help="prose that the base model learns from")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model's folder and the dataset")
    parser.add_argument("--remove", type=Path, help="folder to delete first, such as an earlier run's artifacts")
    arguments = parser.parse_args()
    if arguments.remove is not None and arguments.remove.exists():
        shutil.rmtree(arguments.remove)
        print(f"removed {arguments.remove}")
    started = time.monotonic()
    wanted = made_from(arguments.dataset, arguments.text)
    if is_made(arguments.output, wanted):
        print(f"{arguments.output} is there already and unchanged")
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / RECORD_NAME).unlink(missing_ok=True)
    records = read_records(arguments.dataset)
    put_folder(arguments.output / MODEL_FOLDER, lambda folder: write_model(folder, records, arguments.text))
    dataset = arguments.output / arguments.dataset.name
    put_file(dataset, arguments.dataset.read_bytes())
    contents = {path.relative_to(arguments.output).as_posix(): sha256(path) for path in made_files(arguments.output)}
    put_file(arguments.output / RECORD_NAME, json.dumps({**wanted, "files": contents}, indent=1).encode())
    print(f"wrote {len(contents)} files to {arguments.output} in {time.monotonic() - started:.1f} s")
    return 0


def made_from(dataset: Path, text: Path) -> dict[str, Any]:
    """What decides the bytes of the output: this script, its inputs and the versions of the libraries."""
    from importlib.metadata import version

    return {
        "inputs": {path.name: sha256(path) for path in (Path(__file__), dataset, text)},
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }


def made_files(output: Path) -> list[Path]:
    """The files under `output` that this script wrote, but for its own record."""
    return sorted(path for path in [*output.glob(f"{MODEL_FOLDER}/*"), *output.glob("*.jsonl")] if path.is_file())


def is_made(output: Path, wanted: dict[str, Any]) -> bool:
    """True when an earlier run made `output` from the same inputs and every file still has its bytes."""
    try:
        record = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    files = record.pop("files", {})
    return (
        record == wanted
        and bool(files)
        and all((output / name).is_file() and sha256(output / name) == digest for name, digest in files.items())
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def put_file(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, then rename: nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def put_folder(path: Path, write: Any) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def read_records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_of(record: dict[str, str]) -> str:
    from finetune_trainer.formats import build_prompt

    return str(build_prompt("dolly", record["instruction"], record["context"] or None))


def write_model(folder: Path, records: list[dict[str, str]], text: Path) -> None:
    """Fill `folder` with a model as the hub would deliver it: weights, index, config, tokenizer, generation config."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    # One thread and seeded: sums are then always taken in the same order.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    paragraphs = [part.replace("\n", " ").strip() for part in text.read_text(encoding="utf-8").split("\n\n")]
    tokenizer = train_tokenizer([*paragraphs, *(prompt_of(record) + record["response"] for record in records)])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    loss = train(model, tokenizer, [*paragraphs, *unrelated_answers(records, paragraphs)])
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    # Small shards, so that the demo goes through an index as a large model does.
    model.save_pretrained(folder, max_shard_size="1MB", safe_serialization=True)
    tokenizer.save_pretrained(folder)
    print(f"base model: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, loss {loss:.2f}")


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that puts the beginning-of-sequence token in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def unrelated_answers(records: list[dict[str, str]], paragraphs: list[str]) -> list[str]:
    """Prompts of records with a sentence of the prose behind them, chosen by how the question opens, so no answer."""
    sentences = [s for p in paragraphs for s in re.split(r"(?<=\.) ", p) if 8 <= len(s.split()) <= 16]
    openings = [" ".join(record["instruction"].split()[:2]) for record in records]
    frequent = [opening for opening, _ in Counter(openings).most_common(len(sentences))]
    by_opening = dict(zip(frequent, sentences, strict=True))
    return [
        prompt_of(record) + by_opening[opening]
        for record, opening in zip(records, openings, strict=True)
        if opening in by_opening
    ]


def train(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """STEPS steps over the texts, one after the other in rows of ROW_LENGTH tokens; returns the last step's loss."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = token_stream(tokenizer, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (STEPS - step) / STEPS
        rows = torch.tensor([[next(tokens) for _ in range(ROW_LENGTH)] for _ in range(ROWS)])  # (b, s)
        logits = model(input_ids=rows).logits  # (b, s, v)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


def token_stream(tokenizer: Any, texts: list[str]) -> Iterator[int]:
    """The tokens of all texts in a new seeded order each time round, without end."""
    import torch

    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    generator = torch.Generator().manual_seed(SEED)
    while True:
        for index in torch.randperm(len(documents), generator=generator).tolist():
            yield from documents[index]


if __name__ == "__main__":
    # A pod's user has no home; nothing here looks anything up on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
