"""Every method and every record format, end to end on the cluster: both seeds' recipes and what else the API offers.

One job for each combination that a user would meet, on models of two layers; together they name each value of
dataset.format, dataset.packing, method.type, method.quantization, lora.variant and parallelism.strategy.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from team import ROOT, TRAINING, Team, failed, make_sources, stage, succeeded, tiny_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

PLUS_ONE = [(f"What is the number after {i}?", f"It is {i + 1}.") for i in range(40)]
CHATS = [
    [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    for question, answer in PLUS_ONE
]
SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORDS: dict[str, list[dict[str, Any]]] = {
    "samsum": [{"id": str(i), "dialogue": f"Amy: {q}\nBen: {a}", "summary": a} for i, (q, a) in enumerate(PLUS_ONE)],
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in PLUS_ONE],
    "promptCompletion": [{"prompt": q + "\n", "completion": a} for q, a in PLUS_ONE],
    "messages": [{"messages": chat} for chat in CHATS],
    "sharegpt": [
        {"conversations": [{"from": SHAREGPT_ROLES[turn["role"]], "value": turn["content"]} for turn in chat]}
        for chat in CHATS
    ],
    "text": [{"text": f"{q} {a}"} for q, a in PLUS_ONE],
    "template": [{"question": q, "answer": a} for q, a in PLUS_ONE],
}
LORA = {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "v_proj"]}


def recipe(format_name: str, packing: str = "bestFit", model: str = "tiny", **spec: Any) -> dict[str, Any]:
    """The parts of a spec; `dataset` and the like in `spec` replace or add to them."""
    question = {"text": PLUS_ONE[7][0], "expected": PLUS_ONE[7][1]}
    dataset = {
        "source": f"workspace:///sources/{format_name}.jsonl",
        "format": format_name,
        "maxLength": 128,
        "packing": packing,
        "validationPercent": 10,
        **spec.pop("dataset", {}),
    }
    training = {**TRAINING, "microBatchSize": 2, "maxSteps": 20, **spec.pop("training", {})}
    return {
        "model": {"source": f"workspace:///sources/{model}"},
        "dataset": dataset,
        "training": training,
        "accelerator": {"type": "cpu", "nodes": 1},
        "evaluate": {"prompts": [question], "maxNewTokens": 8},
        **spec,
    }


def lora(quantization: str = "none", **fields: Any) -> dict[str, Any]:
    return {"type": "lora", "quantization": quantization, "lora": {**LORA, **fields}}


RECIPES = {
    "bloom-samsum-int8": recipe(
        "samsum",
        "wrapped",
        "bloom",
        dataset={"lossOn": "all"},
        method=lora("int8", rank=8, alpha=32, dropout=0.05, targetModules=["query_key_value"]),
    ),
    "chat-dora-fsdp": recipe(
        "messages",
        method=lora(variant="dora", targetModules=["all-linear"]),
        parallelism={"strategy": "fsdp"},
        accelerator={"type": "cpu", "nodes": 2},
        training={"gradientCheckpointing": True},
    ),
    "text-full-fsdp": recipe(
        "text",
        "wrapped",
        method={"type": "full"},
        parallelism={"strategy": "fsdp"},
        accelerator={"type": "cpu", "nodes": 1, "processesPerNode": 2},
        training={"learningRate": 0.003, "precision": "bf16"},
    ),
    "template-nf4": recipe(
        "template",
        "none",
        dataset={"template": {"prompt": "Question: {question}\nAnswer: ", "completion": "{answer}"}},
        method=lora("nf4"),
    ),
    "alpaca-rslora": recipe("alpaca", method=lora(variant="rslora", modulesToSave=["lm_head"])),
    "sharegpt-lora": recipe("sharegpt", method=lora(), merge={"enabled": False}),
    "prompt-full": recipe(
        "promptCompletion", method={"type": "full"}, training={"learningRate": 0.003}, merge={"precision": "bf16"}
    ),
}


def make_all_sources(team: Team) -> None:
    make_sources(team)
    team.toolbox((ROOT / "tests" / "tiny_model.py").read_text(), "/workspace/sources/bloom", "bloom")
    for name, records in RECORDS.items():
        team.write(f"sources/{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    team.toolbox(
        "import json, pathlib\n"
        "path = pathlib.Path('/workspace/sources/tiny/tokenizer_config.json')\n"
        f"config = {{**json.loads(path.read_text()), 'chat_template': {CHAT_TEMPLATE!r}}}\n"
        "path.write_text(json.dumps(config))\n"
    )


def test_every_method_and_format_goes_from_records_to_a_better_model(team: Team) -> None:
    """Four at a time: most of a small stage is the start of its program."""
    make_all_sources(team)
    waiting = list(RECIPES)
    for first in range(0, len(waiting), 4):
        group = waiting[first : first + 4]
        for name in group:
            team.apply(tiny_job(team, name, **RECIPES[name]))
        for name in group:
            job = team.wait(name, succeeded, 600, f"{name} to succeed", unless=failed)
            check(team, name, job)


def check(team: Team, name: str, job: dict[str, Any]) -> None:
    spec = RECIPES[name]
    merges = spec["method"]["type"] == "lora" and spec.get("merge", {}).get("enabled", True)
    assert (stage(job, "merge").get("state") == "Succeeded") == merges, name
    found = json.loads(read(team, stage(job, "evaluate")["artifact"]["path"] + "/evaluation.json"))
    assert found["tunedLoss"] < found["baseLoss"], f"{name}: {found}"
    if merges:
        assert found["mergedGreedyAgreement"] == 1, f"{name}: the merged model says what base and adapter say"
    assert job["status"]["trainableParameters"] > 0, name
    log = read(team, stage(job, "train")["artifact"]["path"] + "/training.jsonl")
    losses = [json.loads(line)["loss"] for line in log.splitlines() if line]
    assert losses[-1] < losses[0], f"{name}: {losses}"


def read(team: Team, path: str) -> str:
    return team.toolbox(f"print(open('/workspace/{path}').read())")
