"""Leaves report.html and README.md of a job on the workspace, beside the artifacts of its stages.

stage.py calls leave_report after every stage that has made something of the model. The files are a view: they are in no
artifact and no digest, each stage replaces them by newer ones, and a job has them whether it evaluates and publishes or
not. Where they cannot be written the log says so, and the stage goes on: no training fails for want of its picture.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from finetune_trainer import contract
from finetune_trainer.adapters import ADAPTER_CONFIG_NAME
from finetune_trainer.contract import StageConfig
from finetune_trainer.report.card import ADAPTER, MODEL, render_card
from finetune_trainer.report.evidence import collect_evidence
from finetune_trainer.report.page import render_page

REPORT_FOLDER = "report"
PAGE_NAME = "report.html"
CARD_NAME = "README.md"


def report_folder(config: StageConfig) -> Path:
    """Where a job's report is: `report` beside its artifacts."""
    return config.output_path.parent / REPORT_FOLDER


def render_report(config: StageConfig) -> dict[str, bytes]:
    """report.html and README.md by name, from what is on the volume now."""
    evidence = collect_evidence(config)
    return {
        PAGE_NAME: render_page(evidence).encode("utf-8"),
        CARD_NAME: render_card(evidence, contents(config)).encode("utf-8"),
    }


def contents(config: StageConfig) -> str:
    """Whether the result so far is a whole MODEL or an ADAPTER."""
    if contract.MERGE in config.inputs or config.stage == contract.MERGE:
        return MODEL
    folder = config.output_path if config.stage == contract.CONSOLIDATE else None
    if contract.CONSOLIDATE in config.inputs:
        folder = config.input_path(contract.CONSOLIDATE)
    return ADAPTER if folder is not None and (folder / ADAPTER_CONFIG_NAME).is_file() else MODEL


def leave_report(config: StageConfig) -> None:
    """Write the report of the job that `config` is a stage of, where the operator told its history; never raises."""
    if config.stage not in contract.REPORTING or not config.history:
        return
    folder = report_folder(config)
    try:
        files = render_report(config)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _replace(folder / name, data)
        print(f"the job's report is at {folder / PAGE_NAME}", flush=True)
    except Exception as error:  # noqa: BLE001 - a report that cannot be made costs no stage its success
        traceback.print_exception(error)
        print(f"the job's report could not be written to {folder}: the stage's own result is complete", flush=True)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
