"""prepare: fetches the base model and the dataset, and decides everything about the data that training reads.

Its artifact holds rows of a fixed length, labels and the order of rows, so that a training loop only reads rows n to m,
whatever its backend and topology. Model and dataset are artifacts of their own that all jobs on the volume share.
Nothing here loads weights or needs torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer import formats, packing, rows
from finetune_trainer.artifacts import artifact_ref, new_artifact, read_manifest
from finetune_trainer.contract import (
    DATASET_INPUT,
    DATASET_TOKEN_SECRET,
    DATASETS_FOLDER,
    MODEL_INPUT,
    MODEL_TOKEN_SECRET,
    MODELS_FOLDER,
    ArtifactRef,
    ContractError,
    Report,
    StageConfig,
    canonical_json,
)
from finetune_trainer.documents import Collected, collect_documents
from finetune_trainer.errors import UserError
from finetune_trainer.label_audit import AUDIT_FILE
from finetune_trainer.model_files import check_unquantized
from finetune_trainer.model_shape import check_length, read_model_shape
from finetune_trainer.rejections import Rejections
from finetune_trainer.sources import open_source
from finetune_trainer.sources.datasets import fetch_dataset
from finetune_trainer.sources.models import fetch_model
from finetune_trainer.spool import DocumentSpool
from finetune_trainer.stage import finished_report, keep_report
from finetune_trainer.tokenization import Encoder, load_tokenizer
from finetune_trainer.tokenizer_files import frozen_digests, tokenizer_files

DATA_FILE = "data.json"
REJECTED_FILE = "rejected.jsonl"
COMPLETION = "completion"
ALL = "all"


@dataclass(frozen=True)
class Args:
    """What prepare is asked for.

    `max_length` is in tokens, and the length of a row; `validation_percent` and `max_rejected_percent` are shares of
    all records; exactly one of `max_steps` and `epochs` is set; `global_batch_size` counts rows.
    """

    model_source: str
    model_revision: str | None
    trust_remote_code: bool
    dataset_source: str
    dataset_revision: str | None
    split: str
    configuration: str | None
    files: str | list[str] | None
    format: str
    template: Mapping[str, Any] | None
    max_length: int
    packing: str
    loss_on: str
    validation_percent: float
    max_rejected_percent: float
    max_steps: int | None
    epochs: float | None
    seed: int
    global_batch_size: int


def parse_args(config: StageConfig) -> Args:
    """Args of stage.json; ContractError names the field that is missing or wrong."""
    model, dataset, training = (_section(config.spec, name) for name in ("model", "dataset", "training"))
    args = Args(
        model_source=_field(model, "model.source", str),
        model_revision=_field(model, "model.revision", str, None),
        trust_remote_code=_field(model, "model.trustRemoteCode", bool, False),
        dataset_source=_field(dataset, "dataset.source", str),
        dataset_revision=_field(dataset, "dataset.revision", str, None),
        split=_field(dataset, "dataset.split", str, "train"),
        configuration=_field(dataset, "dataset.configuration", str, None),
        files=_field(dataset, "dataset.files", (str, list), None),
        format=_field(dataset, "dataset.format", str),
        template=_field(dataset, "dataset.template", dict, None),
        max_length=_field(dataset, "dataset.maxLength", int),
        packing=_field(dataset, "dataset.packing", str, packing.BEST_FIT),
        loss_on=_field(dataset, "dataset.lossOn", str, COMPLETION),
        validation_percent=_field(dataset, "dataset.validationPercent", (int, float), 0),
        max_rejected_percent=_field(dataset, "dataset.maxRejectedPercent", (int, float), 0),
        max_steps=_field(training, "training.maxSteps", int, None),
        epochs=_field(training, "training.epochs", (int, float), None),
        seed=_field(training, "training.seed", int, 42),
        global_batch_size=_field(config.parallelism, "parallelism.globalBatchSize", int),
    )
    for name, value, allowed in (
        ("dataset.format", args.format, formats.FORMATS),
        ("dataset.packing", args.packing, packing.PACKINGS),
        ("dataset.lossOn", args.loss_on, (COMPLETION, ALL)),
    ):
        if value not in allowed:
            raise ContractError(f"stage.json: spec.{name} is {value!r}, expected one of {', '.join(allowed)}")
    if (args.max_steps is None) == (args.epochs is None):
        raise ContractError(
            f"stage.json: set either training.maxSteps or training.epochs, got {args.max_steps} and {args.epochs}"
        )
    for name, number in (
        ("dataset.maxLength", args.max_length),
        ("training.maxSteps", args.max_steps),
        ("training.epochs", args.epochs),
        ("globalBatchSize", args.global_batch_size),
    ):
        if number is not None and number <= 0:
            raise ContractError(f"stage.json: {name} is {number}, it must be above 0")
    return args


def run(config: StageConfig) -> Report:
    """Run prepare; see the module's docstring. Raises UserError, RetryableError, CorruptArtifact, ContractError."""
    args = parse_args(config)
    if args.format not in formats.CONVERSATIONS:
        formats.open_format(args.format, template=args.template)  # a template that is none is told before any download
    workspace = config.workspace_path
    model = fetch_model(
        open_source(
            args.model_source,
            repo_type="model",
            revision=args.model_revision,
            token_file=config.secrets.get(MODEL_TOKEN_SECRET),
            workspace=workspace,
        ),
        root=workspace / MODELS_FOLDER,
        trust_remote_code=args.trust_remote_code,
    )
    check_unquantized(model)
    dataset = fetch_dataset(
        open_source(
            args.dataset_source,
            repo_type="dataset",
            revision=args.dataset_revision,
            token_file=config.secrets.get(DATASET_TOKEN_SECRET),
            workspace=workspace,
        ),
        root=workspace / DATASETS_FOLDER,
        split=args.split,
        configuration=args.configuration,
        files=args.files,
    )
    artifacts = {MODEL_INPUT: artifact_ref(workspace, model), DATASET_INPUT: artifact_ref(workspace, dataset)}
    tokenizer = load_tokenizer(model, trust_remote_code=args.trust_remote_code)
    record_format = formats.open_format(args.format, template=args.template, tokenizer=tokenizer)
    encoder = Encoder(tokenizer, record_format.end_of_turn)
    check_length(model, args.max_length)
    with _open_spool(config, artifacts) as spool:
        read = collect_documents(
            dataset,
            encoder,
            spool,
            record_format=record_format,
            max_length=None if args.packing == packing.WRAPPED else args.max_length,
            learn_prompt=args.loss_on == ALL,
            seed=args.seed,
            rejections=Rejections(args.max_rejected_percent),
        )
        print(read.audit.summary(), flush=True)
        read.audit.check()
        _check_vocabulary(model, spool.largest_token())
        with new_artifact(config.output_path, config.stage) as writer:
            plan = _plan(args, spool)
            pad = _padding_token(model, encoder)
            for name, some in ((rows.ROWS_FILE, plan.rows), (rows.VALIDATION_FILE, plan.validation_rows)):
                rows.write_rows(writer, name, spool, some, row_length=args.max_length, pad=pad)
            count = plan.steps * args.global_batch_size
            rows.write_order(writer, packing.iterate_order(len(plan.rows), count, args.seed), count)
            data = {**_describe(args, plan, encoder, read), **_frozen(args, model, record_format)}
            writer.write(DATA_FILE, canonical_json(data))
            writer.write(REJECTED_FILE, read.rejections.as_lines())
            writer.write(AUDIT_FILE, read.audit.as_lines())
            writer.metadata.update(frozen_digests(data))
            writer.versions.update(_versions())
            keep_report(writer, _metrics(data, model), artifacts)
    return finished_report(config)


@dataclass(frozen=True)
class _Plan:
    """What stands in the rows, for training and validation, and the job's number of optimizer steps.

    `unlearnt_at_cuts` counts tokens that are learnt where their document is whole: with packing wrapped the first of a
    row has no predecessor in it.
    """

    rows: packing.PackedRows
    validation_rows: packing.PackedRows
    steps: int
    tokens: int
    supervised: int
    documents: int
    validation_documents: int
    unlearnt_at_cuts: int


def _open_spool(config: StageConfig, artifacts: Mapping[str, ArtifactRef]) -> DocumentSpool:
    """Tokenised documents beside the output; an attempt before this one left them there if it was killed."""
    key = {
        "spec": config.spec,
        "inputs": {name: ref.digest for name, ref in artifacts.items()},
        "versions": _versions(),
    }
    return DocumentSpool(config.output_path.with_name(f".{config.output_path.name}.spool"), key)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")}


def _plan(args: Args, spool: DocumentSpool) -> _Plan:
    training, held_out = packing.split_validation(spool.keys, args.validation_percent)
    if not len(training):
        raise UserError(
            "NoDocuments",
            f"validationPercent {args.validation_percent} of {len(spool)} documents leaves none to train on: lower it",
        )
    packed = _pack(args, spool, training)
    steps = packing.count_steps(len(packed), args.global_batch_size, max_steps=args.max_steps, epochs=args.epochs)
    supervised = rows.count_supervised(spool, packed, args.max_length)
    _check_steps(args, supervised, steps)
    plan = _Plan(
        rows=packed,
        validation_rows=_pack(args, spool, held_out),
        steps=steps,
        tokens=packed.tokens,
        supervised=int(supervised.sum()),
        documents=len(training),
        validation_documents=len(held_out),
        unlearnt_at_cuts=int(spool.supervised_counts[training].sum() - supervised.sum()),
    )
    print(
        f"{plan.documents} documents of {plan.tokens} tokens, {plan.supervised} of them learnt, in {len(plan.rows)} "
        f"rows of {args.max_length} ({100 * plan.tokens / (len(plan.rows) * args.max_length):.2f} % full); "
        f"{plan.validation_documents} held out in {len(plan.validation_rows)} rows\n"
        f"{steps} steps x {args.global_batch_size} rows = {steps * args.global_batch_size} rows, "
        f"{steps * args.global_batch_size / len(plan.rows):.3f} epochs",
        flush=True,
    )
    if plan.rows.cuts:
        print(
            f"documents are cut at {plan.rows.cuts} row ends; {plan.unlearnt_at_cuts} tokens that begin a row there "
            "are not learnt, since what they follow is in the row before",
            flush=True,
        )
    return plan


def _pack(args: Args, spool: DocumentSpool, numbers: packing.Numbers) -> packing.PackedRows:
    return packing.pack_documents(args.packing, spool.lengths[numbers], args.max_length, numbers)


def _check_steps(args: Args, supervised: packing.Numbers, steps: int) -> None:
    """UserError when a step would learn nothing: with wrapped a row may be all prompt."""
    if supervised.all():
        return
    count, step = steps * args.global_batch_size, 0
    rest = np.zeros(0, dtype=np.int32)
    for part in packing.iterate_order(len(supervised), count, args.seed):
        order = np.concatenate([rest, part])
        whole = len(order) // args.global_batch_size
        batches = order[: whole * args.global_batch_size].reshape(whole, args.global_batch_size)
        empty = np.flatnonzero(supervised[batches].sum(axis=1) == 0)
        if len(empty):
            raise UserError(
                "NothingSupervised",
                f"no token of the {args.global_batch_size} rows of step {step + int(empty[0]) + 1} is learnt: prompts "
                f"of {args.max_length} tokens and more fill {np.count_nonzero(supervised == 0)} of {len(supervised)} "
                "rows; raise spec.dataset.maxLength or the batch, or use packing bestFit",
            )
        step, rest = step + whole, order[whole * args.global_batch_size :]


def _describe(args: Args, plan: _Plan, encoder: Encoder, read: Collected) -> dict[str, Any]:
    """data.json: what training and evaluation must know of the data besides the rows."""
    return {
        "format": args.format,
        "packing": args.packing,
        "lossOn": args.loss_on,
        "seed": args.seed,
        "rowLength": args.max_length,
        "globalBatchSize": args.global_batch_size,
        "maxSteps": plan.steps,
        "epochs": round(plan.steps * args.global_batch_size / len(plan.rows), 6),
        "rows": len(plan.rows),
        "documents": plan.documents,
        "tokens": plan.tokens,
        "supervisedTokens": plan.supervised,
        "cuts": plan.rows.cuts,
        "unlearntAtCuts": plan.unlearnt_at_cuts,
        "validationRows": len(plan.validation_rows),
        "validationDocuments": plan.validation_documents,
        "records": read.records,
        "rejected": len(read.rejections.problems),
        "rejectedByKind": read.rejections.counts(),
        "cutMessages": read.cut,
        **read.audit.metrics(),
        "eosTokenId": encoder.eos_token_id,
        "padTokenId": encoder.pad_token_id,
        "stopTokenIds": sorted(encoder.stop_token_ids),
        "prefixTokenIds": encoder.prefix,
        "trustRemoteCode": args.trust_remote_code,
    }


def _frozen(args: Args, model: Path, record_format: formats.RecordFormat) -> dict[str, Any]:
    """What evaluation must find again to ask what was trained: the template, and digests of prompts and tokenizer."""
    return {
        "template": args.template,
        "promptSha256": record_format.prompt_digest(),
        "tokenizer": tokenizer_files(read_manifest(model)),
    }


def _metrics(data: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """What the report says: the data's figures, and the model's sizes, by which the operator checks what follows."""
    names = (
        "rows", "documents", "validationDocuments", "tokens", "supervisedTokens", "maxSteps", "epochs", "rejected",
        "rejectedByKind", "cutMessages", "supervisedPercent", "stopSupervisedPercent", "doubleBos",
        "supervisedHistogram",
    )  # fmt: skip
    shape = read_model_shape(model)
    return {**{name: data[name] for name in names}, **({} if shape is None else {"model": shape})}


def _check_vocabulary(model: Path, largest: int) -> None:
    size = json.loads((model / "config.json").read_bytes()).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise UserError(
            "TokenizerNotUsable",
            f"the tokenizer gave token {largest}, the model's vocab_size is {size}: the tokenizer is another model's",
        )


def _padding_token(model: Path, encoder: Encoder) -> int:
    """What fills rows. A padding token that was added to the tokenizer alone is no row of the model's embedding."""
    size = json.loads((model / "config.json").read_bytes()).get("vocab_size")
    outside = isinstance(size, int) and encoder.pad_token_id >= size
    return encoder.eos_token_id if outside else encoder.pad_token_id


def _section(spec: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = spec.get(name)
    if not isinstance(value, Mapping):
        raise ContractError(f"stage.json: spec.{name} must be an object, got {value!r}")
    return value


_REQUIRED = object()


def _field(section: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    """The value of `name`'s last part; null and absence mean the default."""
    value = section.get(name.rsplit(".", 1)[-1])
    if value is None:
        if default is _REQUIRED:
            raise ContractError(f"stage.json: {name} is missing")
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ContractError(f"stage.json: {name} has the wrong type: {value!r}")
    return value
