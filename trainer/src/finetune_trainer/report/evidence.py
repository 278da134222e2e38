"""What a job's report is made of: the artifacts of its stages, training's logs, and what the operator handed in.

collect_evidence reads the volume for reporting.py; page.py and card.py turn an Evidence into text. What is not there is
said in `missing` and is never made up: a job whose evaluation is switched off has a report without one.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_trainer import contract
from finetune_trainer.artifacts import Manifest, find_artifact
from finetune_trainer.contract import ArtifactRef, ContractError, StageConfig
from finetune_trainer.errors import CorruptArtifact
from finetune_trainer.json_files import read_json_file, read_json_lines

TRAINING_LOG = "training.jsonl"
TIMINGS = "timings.jsonl"
DATA = "data.json"
LABEL_AUDIT = "label-audit.jsonl"
EVALUATION = "evaluation.json"

_STAGE_WORDS = {
    contract.MODEL_INPUT: "base model",
    contract.DATASET_INPUT: "dataset",
    contract.PREPARE: "prepared data",
    contract.TRAIN: "trained checkpoint",
    contract.CONSOLIDATE: "consolidated result",
    contract.MERGE: "merged model",
    contract.EVALUATE: "evaluation",
}
_SAMPLES = 3
"""Documents of the label audit that the page shows."""


@dataclass(frozen=True)
class Evidence:
    """Everything that the report shows; every field may be empty.

    `history` is stage.json's, from the operator. `steps` and `held_out` are lines of training.jsonl, `timings` those of
    timings.jsonl, where a step that was done again has one line an attempt. `manifests` are those of the artifacts by
    input name, `missing` sentences about what is not there.
    """

    job: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    held_out: Sequence[Mapping[str, Any]] = ()
    timings: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    trainer_version: str | None = None
    missing: Sequence[str] = ()

    @property
    def spec(self) -> Mapping[str, Any]:
        """The job's spec as far as the operator handed it in."""
        return _mapping(self.history.get("spec"))

    def section(self, name: str) -> Mapping[str, Any]:
        """One object of the spec, empty where it is not there."""
        return _mapping(self.spec.get(name))

    def metrics(self, stage: str) -> Mapping[str, Any]:
        """What a stage reported: in the operator's words where they are handed in, else as its artifact keeps them."""
        told = _mapping(_mapping(self.history.get("metrics")).get(stage))
        manifest = self.manifests.get(stage)
        kept = _mapping(_mapping(manifest.metadata.get("report")).get("metrics")) if manifest is not None else {}
        return {**kept, **told}

    @property
    def base_source(self) -> str | None:
        """Where the base model came from, such as hf://org/name."""
        return self._source(contract.MODEL_INPUT, "model")

    @property
    def dataset_source(self) -> str | None:
        """Where the dataset came from."""
        return self._source(contract.DATASET_INPUT, "dataset")

    def _source(self, name: str, section: str) -> str | None:
        manifest = self.manifests.get(name)
        found = manifest.metadata.get("source") if manifest is not None else self.section(section).get("source")
        return found if isinstance(found, str) else None

    def version(self, name: str) -> str | None:
        """The revision that an input was fetched at, such as a hub's commit."""
        manifest = self.manifests.get(name)
        found = manifest.metadata.get("version") if manifest is not None else None
        return found if isinstance(found, str) and found else None

    @property
    def attempts(self) -> Sequence[Mapping[str, Any]]:
        """Attempts that ended without their artifact, and preemptions, oldest first."""
        return [entry for entry in self.history.get("attempts") or () if isinstance(entry, Mapping)]


def collect_evidence(config: StageConfig) -> Evidence:
    """Read what is on the volume of the job that `config` is a stage of, the stage's own artifact included."""
    places = dict(_places(config))
    manifests, missing = {}, []
    for name, path in places.items():
        manifest = find_artifact(path)
        if manifest is None:
            missing.append(f"The {_STAGE_WORDS.get(name, name)} is no longer complete at {path}.")
        else:
            manifests[name] = manifest
    lines = _lines(places, manifests, contract.TRAIN, TRAINING_LOG, missing)
    work = places[contract.TRAIN].with_name(places[contract.TRAIN].name + ".work") if contract.TRAIN in places else None
    audit = _lines(places, manifests, contract.PREPARE, LABEL_AUDIT, missing)
    evaluation = _object(places, manifests, contract.EVALUATE, EVALUATION, missing)
    if contract.EVALUATE not in places:
        missing.append(_no_evaluation(config))
    if not config.history:
        missing.append("The operator handed in no history: attempts, time and cost are not known.")
    return Evidence(
        job=config.job,
        history=config.history,
        steps=[line for line in lines if _is_number(line.get("step")) and _is_number(line.get("loss"))],
        held_out=[line for line in lines if _is_number(line.get("step")) and _is_number(line.get("validationLoss"))],
        timings=[line for line in read_json_lines(work / TIMINGS) if _is_number(line.get("step"))] if work else [],
        data=_object(places, manifests, contract.PREPARE, DATA, missing),
        samples=[line for line in audit if "spans" in line][:_SAMPLES],
        evaluation=evaluation,
        manifests=manifests,
        trainer_version=_trainer_version(),
        missing=tuple(missing),
    )


def _places(config: StageConfig) -> Iterator[tuple[str, Path]]:
    """(input name, folder) of every artifact that is known of, the stage's own last."""
    known = _mapping(config.history.get("artifacts"))
    refs = {}
    for name, value in known.items():
        try:
            refs[str(name)] = ArtifactRef.from_json(value, f"history: artifacts.{name}")
        except ContractError:
            continue
    refs.update(config.inputs)
    for name, ref in refs.items():
        if name != config.stage:
            yield name, config.workspace_path / ref.path
    if config.stage != contract.PUBLISH:
        yield config.stage, config.output_path


def _trainer_version() -> str | None:
    try:
        return importlib.metadata.version("finetune-trainer")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout


def _no_evaluation(config: StageConfig) -> str:
    skipped = not _mapping(_mapping(config.history.get("spec")).get("evaluate")).get("enabled", True)
    if skipped:
        return "The tuned model was not evaluated: spec.evaluate.enabled is false."
    return "The tuned model is not evaluated yet: this report was written before that stage."


def _object(
    places: Mapping[str, Path], manifests: Mapping[str, Manifest], name: str, file: str, missing: list[str]
) -> Mapping[str, Any]:
    if name not in manifests:
        return {}
    try:
        return _mapping(read_json_file(places[name] / file))
    except (CorruptArtifact, FileNotFoundError) as error:
        missing.append(f"{file} cannot be read: {error}")
        return {}


def _lines(
    places: Mapping[str, Path], manifests: Mapping[str, Manifest], name: str, file: str, missing: list[str]
) -> list[Mapping[str, Any]]:
    if name not in manifests:
        return []
    lines = read_json_lines(places[name] / file)
    if not lines:
        missing.append(f"{file} of the {_STAGE_WORDS[name]} is not there or empty.")
    return list(lines)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
