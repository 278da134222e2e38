"""Writes crds/*.yaml, docs/api.md and the trainer's spec_schema.json from the typed models.

`python -m finetune_operator.api.crd [REPOSITORY]`, called by `make generate`; a test compares its output with the
files. Nothing here describes a field: that is spec.py's and status.py's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import constants, reference
from finetune_operator.api.schema import object_schema, spec_schema
from finetune_trainer.spec_checks import SCHEMA_FILE

_HEADER = "# Generated from operator/src/finetune_operator/api by `make generate`; edit there.\n"


def _column(name: str, path: str, kind: str, description: str, *, wide: bool = False) -> dict[str, Any]:
    column = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return {**column, "priority": 1} if wide else column


COLUMNS = (
    _column("Phase", ".status.phase", "string", "The job in one word."),
    _column("Stage", ".status.stage", "string", "Place and name of the current stage."),
    _column("Progress", ".status.progress", "string", "Share of the work done."),
    _column("ETA", ".status.eta", "string", "Estimated time to the end."),
    _column("Restarts", ".status.restarts", "integer", "Attempts that ended without their artifact."),
    _column("Reason", ".status.reason", "string", "The reason that matters most now."),
    _column("Age", ".metadata.creationTimestamp", "date", "Time since the job was made."),
    _column("Model", ".spec.model.source", "string", "The base model.", wide=True),
    _column("Method", ".spec.method.type", "string", "What is trained.", wide=True),
    _column("Queue", ".spec.queue.name", "string", "The Kueue LocalQueue.", wide=True),
    _column("Nodes", ".spec.accelerator.nodes", "integer", "Pods of the train stage.", wide=True),
    _column("Loss", ".status.training.loss", "number", "Training loss of the last logged step.", wide=True),
    _column("Step", ".status.training.step", "integer", "Steps done.", wide=True),
    _column("Checkpoint", ".status.training.lastCheckpoint.time", "date", "Age of the newest checkpoint.", wide=True),
)


def custom_resource_definition() -> dict[str, Any]:
    """The CustomResourceDefinition of FineTuneJob."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": constants.CRD_NAME},
        "spec": {
            "group": constants.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": constants.KIND,
                "listKind": constants.LIST_KIND,
                "plural": constants.PLURAL,
                "singular": constants.SINGULAR,
                "shortNames": [constants.SHORT_NAME],
                "categories": [constants.CATEGORY],
            },
            "versions": [
                {
                    "name": constants.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": list(COLUMNS),
                    "schema": {"openAPIV3Schema": object_schema()},
                }
            ],
        },
    }


class _PlainDumper(yaml.SafeDumper):
    """Writes equal lists out each time: an anchor in a CRD is hard on the reader's eye."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def generated_files() -> Mapping[str, str]:
    """What is generated: path relative to the repository's root -> text."""
    definition = custom_resource_definition()
    text = yaml.dump(definition, Dumper=_PlainDumper, sort_keys=False, width=110, allow_unicode=True)
    return {
        f"crds/{constants.GROUP}_{constants.PLURAL}.yaml": _HEADER + text,
        "docs/api.md": reference.markdown(definition),
        f"trainer/src/finetune_trainer/{SCHEMA_FILE}": json.dumps(spec_schema(), separators=(",", ":")) + "\n",
    }


def main(arguments: Sequence[str]) -> int:
    """Write the generated files below the folder in `arguments`, or below the current one."""
    root = Path(arguments[0] if arguments else ".")
    for name, text in generated_files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
