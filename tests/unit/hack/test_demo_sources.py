"""The demo's dataset, its example job, and the objects that put model and dataset on the workspace."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import make_base_model
import yaml
from finetune_demo import manifests, result, steps

from finetune_operator.api.finetunejob import parse_spec, unavailable_features

ROOT = Path(__file__).parents[3]
DATASET = ROOT / "examples" / "data" / "finetune-faq.jsonl"
RECORDS: list[dict[str, str]] = [json.loads(line) for line in DATASET.read_text(encoding="utf-8").splitlines()]
EXAMPLE: dict[str, Any] = yaml.safe_load((ROOT / steps.EXAMPLE).read_text(encoding="utf-8"))
FILES = [ROOT / path for path in steps.SOURCE_FILES]


def test_the_dataset_has_at_least_300_records_in_dollys_schema() -> None:
    assert len(RECORDS) >= 300
    assert {frozenset(record) for record in RECORDS} == {frozenset({"instruction", "context", "response", "category"})}
    assert {record["category"] for record in RECORDS} == {"open_qa", "general_qa", "closed_qa"}


def test_every_record_is_one_short_question_with_one_short_answer() -> None:
    assert [question for question, count in Counter(r["instruction"] for r in RECORDS).items() if count > 1] == []
    for record in RECORDS:
        assert all(record[name] == record[name].strip() for name in record)
        assert 3 <= len(record["instruction"].split()) <= 15, record
        assert 5 <= len(record["response"].split()) <= 15, record
        assert record["instruction"][-1] in "?.", record
        assert record["response"][-1] == ".", record
        assert bool(record["context"]) == (record["category"] == "closed_qa"), record


def test_the_example_is_a_job_that_this_release_can_run() -> None:
    spec = parse_spec(EXAMPLE["spec"])
    assert list(unavailable_features(spec)) == []
    assert spec.accelerator.nodes == 2
    assert spec.training.checkpoint_every_steps < (spec.training.max_steps or 0) / 2


def test_the_example_asks_ten_of_the_records() -> None:
    known = {(r["instruction"], r["context"]): r["response"] for r in RECORDS}
    asked = {(p["text"], p.get("context", "")): p["expected"] for p in EXAMPLE["spec"]["evaluate"]["prompts"]}
    assert len(asked) == 10
    assert asked == {question: known.get(question) for question in asked}
    assert len(asked) >= result.NEEDED_EXACT


def test_the_prose_of_the_base_model_holds_no_answer() -> None:
    prose = " ".join(FILES[2].read_text(encoding="utf-8").split())
    assert [record["response"] for record in RECORDS if record["response"] in prose] == []


def test_the_sources_job_is_named_by_its_inputs() -> None:
    names = [
        manifests.sources("n", "c", image, files)[1]["metadata"]["name"]
        for image, files in (("i:1", FILES), ("i:1", FILES), ("i:2", FILES), ("i:1", [FILES[0], FILES[2], FILES[1]]))
    ]
    assert names[0] == names[1]
    assert names[2] != names[0]


def test_what_the_demo_starts_meets_the_restricted_pod_standard() -> None:
    pods = [
        manifests.sources("n", "c", "i", FILES)[1]["spec"]["template"]["spec"],
        manifests.reader("n", "c", "i", "x/evaluation.json")["spec"],
    ]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_fresh_start_removes_the_folder_of_that_job_alone() -> None:
    (container,) = manifests.sources("n", "c", "i", FILES, "finetune/jobs/n/tiny-cpu")[1]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["command"][-2:] == ["--remove", "/workspace/finetune/jobs/n/tiny-cpu"]


def test_sources_are_made_in_the_hubs_layout_and_not_made_twice(tmp_path: Path) -> None:
    # The layout and the second run are the question here, so two steps of training are enough.
    text = FILES[0].read_text(encoding="utf-8")
    assert "\nSTEPS = 60\n" in text
    script, output = tmp_path / "make_base_model.py", tmp_path / "sources"
    script.write_text(text.replace("\nSTEPS = 60\n", "\nSTEPS = 2\n"), encoding="utf-8")
    inputs = ["--dataset", str(FILES[1]), "--text", str(FILES[2])]
    command = [sys.executable, str(script), *inputs, "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    model = output / "tiny-llama"
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"
    assert {path.name for path in model.iterdir()} >= {
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert (output / DATASET.name).read_bytes() == DATASET.read_bytes()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "unchanged" in again
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    made_from = json.loads((output / make_base_model.RECORD_NAME).read_text())
    made_from.pop("files")
    assert make_base_model.is_made(output, made_from)
    (model / "config.json").write_text("{}")
    assert not make_base_model.is_made(output, made_from)
