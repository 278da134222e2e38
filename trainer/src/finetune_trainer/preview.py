"""`finetune-trainer preview JOB.yaml`: what a job's data will teach, seen before an accelerator is paid for.

Reads a FineTuneJob's manifest, fetches the tokenizer (no weights) and the dataset, makes documents of the first records
exactly as prepare will, and prints some of them with what is learnt marked, and the label audit. Nothing is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from finetune_trainer import packing
from finetune_trainer.commands import run_by_hand
from finetune_trainer.documents import Collected, collect_documents
from finetune_trainer.errors import UserError
from finetune_trainer.formats import open_format
from finetune_trainer.model_shape import check_length
from finetune_trainer.rejections import Rejections
from finetune_trainer.sources import open_source
from finetune_trainer.sources.datasets import fetch_dataset
from finetune_trainer.sources.models import fetch_tokenizer
from finetune_trainer.spec_checks import check_spec, with_defaults
from finetune_trainer.spool import DocumentSpool
from finetune_trainer.stage import refuse
from finetune_trainer.tokenization import Encoder, load_tokenizer

_KIND = "FineTuneJob"
_ALL_RECORDS_MAY_FAIL = 100
_LISTED = 10

_LEARNT, _READ, _BOLD, _RED, _OFF = "\x1b[30;42m", "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
_OPEN, _CLOSE = "⟦", "⟧"
"""Around what is learnt where there are no colours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Show what the command line names; returns the exit code, that of the contract where something is wrong."""
    arguments = _parser().parse_args(argv)
    return run_by_hand(
        lambda: run(
            arguments.manifest,
            workspace=arguments.workspace,
            token_file=arguments.token_file,
            records=arguments.records,
            samples=arguments.samples,
            out=sys.stdout,
        )
    )


def run(
    manifest: Path, *, workspace: Path, token_file: str | None, records: int, samples: int, out: TextIO
) -> Collected:
    """Print `samples` documents of the first `records` records, and their audit, to `out`.

    `workspace` is the folder that workspace:/// means, `token_file` holds the hub's token. UserError when the manifest,
    a source or the labels are wrong, or more records than maxRejectedPercent cannot be used: what would end prepare.
    """
    spec = read_spec(manifest)
    model, dataset, training = spec["model"], spec["dataset"], spec["training"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redirect_stdout(sys.stderr):  # what stages say of their progress
            opened = {
                kind: open_source(
                    section["source"],
                    repo_type=kind,
                    revision=section.get("revision"),
                    token_file=token_file,
                    workspace=workspace,
                )
                for kind, section in (("model", model), ("dataset", dataset))
            }
            trusted = bool(model.get("trustRemoteCode"))
            fetch_tokenizer(opened["model"], folder / "model", trust_remote_code=trusted)
            check_length(folder / "model", dataset["maxLength"])
            tokenizer = load_tokenizer(folder / "model", trust_remote_code=trusted)
            record_format = open_format(dataset["format"], template=dataset.get("template"), tokenizer=tokenizer)
            data = fetch_dataset(
                opened["dataset"],
                root=folder / "datasets",
                split=dataset["split"],
                configuration=dataset.get("configuration"),
                files=dataset.get("files"),
            )
            with DocumentSpool(folder) as spool:
                read = collect_documents(
                    data,
                    Encoder(tokenizer, record_format.end_of_turn),
                    spool,
                    record_format=record_format,
                    max_length=None if dataset["packing"] == packing.WRAPPED else dataset["maxLength"],
                    learn_prompt=dataset["lossOn"] == "all",
                    seed=training["seed"],
                    rejections=Rejections(_ALL_RECORDS_MAY_FAIL),
                    most=records,
                )
    _show(read, samples, out, _Paint(out))
    read.audit.check()
    allowed = Rejections(dataset["maxRejectedPercent"])
    allowed.problems = read.rejections.problems
    allowed.check(read.records)
    return read


def read_spec(manifest: Path) -> dict[str, Any]:
    """The spec of the FineTuneJob in `manifest`, defaults filled in; UserError with all that is wrong with it."""
    import yaml

    try:
        documents = [value for value in yaml.safe_load_all(manifest.read_bytes()) if value is not None]
    except OSError as error:
        raise UserError("ManifestNotReadable", f"cannot read {manifest}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("ManifestNotReadable", f"{manifest} is no YAML: {error}") from error
    jobs = [value for value in documents if isinstance(value, Mapping) and value.get("kind") == _KIND]
    if len(jobs) != 1:
        raise UserError(
            "ManifestNotReadable", f"{manifest} has {len(jobs)} objects of kind {_KIND}: name a file that has one"
        )
    spec = jobs[0].get("spec")
    refuse(check_spec(spec))
    return with_defaults(spec or {})


class _Paint:
    """Text in colours where `out` is a terminal and NO_COLOR is not set; else with marks around what is learnt."""

    def __init__(self, out: TextIO) -> None:
        self.colours = out.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, code: str, text: str) -> str:
        return f"{code}{text}{_OFF}" if self.colours and text else text

    def span(self, text: str, *, learnt: bool) -> str:
        """Control characters of the data are written out: nothing of it may drive the terminal."""
        text = "".join(
            character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
        )
        if not self.colours:
            return f"{_OPEN}{text}{_CLOSE}" if learnt else text
        # line by line: a colour that crosses a line's end fills the rest of the line
        return "\n".join(self(_LEARNT if learnt else _READ, line) for line in text.split("\n"))


def _show(read: Collected, samples: int, out: TextIO, paint: _Paint) -> None:
    mark = paint(_LEARNT, "this is learnt") if paint.colours else f"{_OPEN}this is learnt{_CLOSE}"
    print(f"{mark}, the rest is only read\n", file=out)
    for sample in read.audit.samples[:samples]:
        place = f"{sample['file']}, line {sample['line']}"
        title = f"--- {place}: {sample['supervisedTokens']} of {sample['tokens']} tokens are learnt"
        print(paint(_BOLD, title), file=out)
        print("".join(paint.span(span["text"], learnt=span["learnt"]) for span in sample["spans"]) + "\n", file=out)
    print(read.audit.summary(), file=out)
    problems = read.rejections.in_order()
    if problems:
        counts = ", ".join(f"{kind} {count}" for kind, count in read.rejections.counts().items())
        print(paint(_RED, f"\n{len(problems)} of {read.records} records cannot be used: {counts}"), file=out)
        for problem in problems[:_LISTED]:
            print(f"  {problem}", file=out)
    if read.cut:
        print(f"{read.cut} messages behind the last answer of their conversation are left out", file=out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-trainer preview",
        description="Show what a FineTuneJob's data will teach: documents with what is learnt marked, and counts.",
    )
    parser.add_argument("manifest", type=Path, metavar="JOB.yaml", help="manifest of a FineTuneJob")
    parser.add_argument(
        "--workspace", type=Path, default=Path(), help="folder that workspace:/// stands for (default: this one)"
    )
    parser.add_argument("--token-file", help="file with the hub's token, for gated models and datasets")
    parser.add_argument("--records", type=int, default=1000, help="records to read, from the first (default: 1000)")
    parser.add_argument("--samples", type=int, default=5, help="documents to show, at most 20 (default: 5)")
    return parser
