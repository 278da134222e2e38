"""Our Neuron configuration against optimum-neuron's own code: fields, signatures, models, pins, words that we parse.

optimum-neuron is installed without its closed dependencies (requirements/dev.in). A change of its pin that changes
anything we rely on fails here, with the name.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from neuron_shards import ShardLayout
from vendor_calls import Signature, VendorCall, refusals, vendor_calls, vendor_names
from vendor_layout import whole_weights

from finetune_trainer import neuron_stack
from finetune_trainer.backends.neuron_config import VENDOR_ARGUMENTS, training_arguments

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "tests"
FILES = sorted((ROOT / "trainer" / "src" / "finetune_trainer" / "backends").glob("neuron*.py"))
CALLS = vendor_calls(FILES, {"optimum"})
NAMES = vendor_names(FILES, {"optimum"})
OURS = {target: names for target, names in VENDOR_ARGUMENTS.items() if target.startswith("optimum.")}
"""What backends/neuron_config.py says that the backend passes, by module:name."""

LAYOUTS: list[dict[str, Any]] = [
    {"heads": heads, "kv_heads": kv_heads, "head_dim": 2, "tp": tp, "copies": copies, "fuse_qkv": fuse_qkv}
    for heads, kv_heads, tp, copies in (
        (8, 2, 4, 2), (32, 8, 32, 4), (32, 8, 16, 2), (64, 8, 32, 4), (8, 1, 8, 8), (16, 1, 4, 4),
        (24, 2, 8, 4), (8, 2, 4, 4), (12, 6, 4, 2), (24, 6, 12, 2), (12, 3, 6, 2),
    )
    for fuse_qkv in (False, True)
]  # fmt: skip
"""Attention with copies of its KV heads, two heads a rank and more among them."""

TRAINING_CONFIG = {
    "tensor_parallel_size": "1",
    "sequence_parallel_enabled": "False",
    "kv_size_multiplier": "None",
    "pipeline_parallel_size": "1",
    "virtual_pipeline_parallel_size": "1",
    "pipeline_parallel_num_microbatches": "1",
    "pipeline_parallel_use_zero1_optimizer": "False",
    "gradient_checkpointing": "False",
    "checkpoint_dir": "None",
    "num_local_ranks_per_step": "8",
    "use_xser": "True",
    "async_save": "False",
    "fuse_qkv": "False",
    "recompute_causal_mask": "True",
    "transpose_nki_inputs": "True",
}
"""Fields and defaults of TrainingNeuronConfig in 0.4.5: a new one may be one that we would have to set."""
PINNED_BY_IT = {"transformers": "~=4.57.1", "peft": "==0.17.0", "accelerate": "==1.8.1", "torch": "==2.8.0.*"}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What tests/optimum_neuron_facts.py prints, asked about all functions that we call and names that we import."""
    asked = json.dumps(
        {
            "functions": [(call.module, call.name) for call in CALLS] + [target.split(":") for target in OURS],
            "names": [(module, name) for module, name, _ in NAMES],
            "layouts": LAYOUTS,
        }
    )
    command = [sys.executable, str(TESTS / "optimum_neuron_facts.py"), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def source(path: str) -> str:
    """Text of one file of the installed distribution, by its path from site-packages."""
    return Path(str(distribution("optimum-neuron").locate_file(path))).read_text(encoding="utf-8")


def test_the_pin_is_the_table_of_stacks_and_the_sdk_is_its_own(facts: dict[str, Any]) -> None:
    row = neuron_stack.find_stack("ml.trn1.32xlarge")
    assert row is not None
    assert facts["version"] == row.optimum_neuron
    assert facts["sdk"].rpartition(".")[0] == row.sdk.rpartition(".")[0], "an SDK of another minor version"


@pytest.mark.parametrize("name", PINNED_BY_IT)
def test_our_pins_are_its_own(facts: dict[str, Any], name: str) -> None:
    wanted = {re.split(r"\s*[=<>~!;]", text, maxsplit=1)[0]: text for text in facts["requires"]}
    assert PINNED_BY_IT[name].replace(" ", "") in wanted[name].replace(" ", "")


def test_its_configuration_has_the_fields_and_defaults_that_ours_was_written_for(facts: dict[str, Any]) -> None:
    assert facts["TrainingNeuronConfig"] == TRAINING_CONFIG


def test_something_of_it_is_called_and_listed() -> None:
    assert {call.name for call in CALLS} >= {"TrainingNeuronConfig", "get_peft_model"}
    assert len(OURS) >= 8


def test_every_call_fits_its_signature(facts: dict[str, Any]) -> None:
    problems: list[str] = []
    for call, found in zip(CALLS, facts["signatures"][: len(CALLS)], strict=True):
        if found is None:
            problems.append(f"{call}: there is no such name")
            continue
        problems += refusals(call, as_signature(found)) + unknown_keywords(call, found, model_keywords(facts))
    assert problems == []


@pytest.mark.parametrize("target", OURS)
def test_every_argument_that_we_say_we_pass_exists(facts: dict[str, Any], target: str) -> None:
    found = facts["signatures"][len(CALLS) + list(OURS).index(target)]
    assert found is not None, "there is no such name"
    assert set(OURS[target]) - {*found["positional"], *found["keyword_only"]} == set()


@pytest.mark.parametrize("pipeline_ranks", [1, 2])
def test_the_fields_that_we_set_are_those_that_we_say_we_set(pipeline_ranks: int) -> None:
    made = training_arguments(
        tensor_parallel_size=2,
        pipeline_parallel_size=pipeline_ranks,
        micro_steps=2,
        gradient_checkpointing=True,
        keeps_documents_apart=False,
    )
    (said,) = [names for target, names in OURS.items() if target.endswith(":TrainingNeuronConfig")]
    assert set(made) == set(said) <= set(TRAINING_CONFIG)


def as_signature(found: dict[str, Any]) -> Signature:
    return Signature(
        tuple(found["positional"]),
        tuple(found["keyword_only"]),
        frozenset(found["required"]),
        found["any_positional"],
        found["any_keyword"],
    )


def unknown_keywords(call: VendorCall, found: dict[str, Any], models: frozenset[str]) -> list[str]:
    """Keywords that only **kwargs takes and that nothing reads out of it: they would be lost without a word."""
    if not found["any_keyword"]:
        return []
    read = {*found["positional"], *found["keyword_only"], *found["popped"], *models}
    return [f"{call}: nothing there reads {name}" for name in call.keywords if name not in read]


def model_keywords(facts: dict[str, Any]) -> frozenset[str]:
    """What the models' own from_pretrained reads, to which NeuronModelForCausalLM's passes its keywords on."""
    (index,) = [at for at, target in enumerate(OURS) if target.endswith(":NeuronModelMixin.from_pretrained")]
    found = facts["signatures"][len(CALLS) + index]
    assert "attn_implementation" in source("optimum/neuron/models/training/modeling_utils.py")
    return frozenset({*found["keyword_only"], *found["popped"], "attn_implementation"})


def test_every_name_that_is_imported_from_it_exists(facts: dict[str, Any]) -> None:
    assert facts["missing"] == []


def test_it_trains_the_models_that_are_let_through(facts: dict[str, Any]) -> None:
    from finetune_trainer.neuron_rules import MODEL_TYPES

    assert facts["trainingModels"] == sorted(MODEL_TYPES)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        pytest.param(
            "optimum/neuron/utils/neuron_parallel_compile.py", 'hlo_key = "Extracting graphs"', id="graphs in the log"
        ),
        pytest.param(
            "optimum/neuron/utils/misc.py",
            'os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"',
            id="the switch of a traced run",
        ),
        pytest.param(
            "optimum/neuron/utils/cache_utils.py", r'r"--cache_dir=([\w\/-]+)"', id="characters of the cache's path"
        ),
    ],
)
def test_what_we_read_and_write_for_it_is_spelt_as_it_does(file: str, words: str) -> None:
    assert words in source(file)


def test_its_own_compile_command_is_the_one_that_is_installed() -> None:
    (entry,) = [each for each in distribution("optimum-neuron").entry_points if each.name == "neuron_parallel_compile"]
    assert entry.value == "optimum.neuron.utils.neuron_parallel_compile:main"


def test_the_oracle_of_consolidation_cuts_attention_as_the_vendor_does(facts: dict[str, Any]) -> None:
    """Query heads, copies of KV heads and columns of the output projection: where each rank's come from."""
    module = "model.layers.0.self_attn"
    for case, ranks in zip(LAYOUTS, facts["layouts"], strict=True):
        config = {
            "hidden_size": 1, "num_attention_heads": case["heads"], "num_key_value_heads": case["kv_heads"],
            "head_dim": case["head_dim"], "intermediate_size": case["tp"], "num_hidden_layers": 1,
        }  # fmt: skip
        layout = ShardLayout(config, case["tp"], fuse_qkv=case["fuse_qkv"], kv_size_multiplier=case["copies"])
        for rank, found in enumerate(ranks):
            local = layout.local_tensors(whole_weights(case, module), rank)
            ours = {key.removeprefix(f"{module}."): tensor.flatten().tolist() for key, tensor in local.items()}
            assert found == ours, (case, rank)
