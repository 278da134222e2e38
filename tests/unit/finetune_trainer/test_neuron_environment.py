"""The variables of compile and train on Trainium, and the compiler's cache in them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import finetune_trainer
from finetune_trainer.neuron_environment import (
    cache_paths,
    check_cache_path,
    compiled_with,
    nearest_cache_path,
    neuron_environment,
    neuron_variables,
    with_cache_path,
)

CACHE = "/workspace/finetune/neuron-cache"
FLAGS = "--model-type=transformer --distribution-strategy=llm-training --enable-saturate-infinity"


def environment(instance: str = "ml.trn1.32xlarge", *, cores: int = 32, has_efa: bool = False) -> dict[str, str]:
    return neuron_environment(instance, cores=cores, has_efa=has_efa, cache_path=CACHE)


def test_one_trn1_node_has_the_walkthroughs_variables_and_one_cache() -> None:
    assert environment() == {
        "NEURON_RT_NUM_CORES": "32",
        "NEURON_CC_FLAGS": f"{FLAGS} --target=trn1 --cache_dir={CACHE}",
        "NEURON_COMPILE_CACHE_URL": CACHE,
        "NEURON_FUSE_SOFTMAX": "1",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "5",
        "MALLOC_ARENA_MAX": "70",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_several_nodes_talk_over_efa() -> None:
    assert (
        environment("ml.trn1n.32xlarge", has_efa=True).items()
        >= {
            "FI_PROVIDER": "efa",
            "FI_EFA_USE_DEVICE_RDMA": "1",
            "FI_EFA_FORK_SAFE": "1",
            "FI_EFA_USE_HUGE_PAGE": "0",
        }.items()
    )


def test_an_instance_type_has_what_is_its_own() -> None:
    assert environment("ml.trn2.48xlarge", cores=64)["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert "NEURON_LOGICAL_NC_CONFIG" not in environment()
    # Only for trn1 a published script names the target; elsewhere the compiler asks the node that it runs on.
    assert "--target" not in environment("ml.trn2.48xlarge")["NEURON_CC_FLAGS"]


@pytest.mark.parametrize("name", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16", "NEURON_EXTRACT_GRAPHS_ONLY", "GPUS_PER_NODE"])
def test_what_is_obsolete_or_not_read_is_not_set(name: str) -> None:
    assert name not in environment(has_efa=True)


def test_every_variable_says_where_it_comes_from_and_what_for() -> None:
    for instance in ("ml.trn1.32xlarge", "ml.trn2.48xlarge"):
        variables = neuron_variables(instance, cores=32, has_efa=True, cache_path=CACHE)
        assert len({each.name for each in variables}) == len(variables)
        assert [each.name for each in variables if len(each.source) < 20 or len(each.why) < 10] == []


def test_fuse_qkv_is_set_to_nothing_but_false() -> None:
    """With shared heads and an adapter the vendor's forward pass raises (optimum-neuron 0.4.5, peft/tuners/lora)."""
    found = []
    for path in Path(finetune_trainer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            pairs: list[tuple[object, ast.expr]] = []
            if isinstance(node, ast.Dict):
                pairs = [
                    (key.value, value)
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)
                ]
            elif isinstance(node, ast.keyword):
                pairs = [(node.arg, node.value)]
            found += [value.value for name, value in pairs if name == "fuse_qkv" and isinstance(value, ast.Constant)]
    assert found
    assert not any(found)


# the cache


@pytest.mark.parametrize("path", ["/fsx/llama3.1", "s3://bucket/cache", "relative", "", "/a b", "/"])
def test_a_path_that_optimum_neuron_would_cut_is_refused_with_one_that_it_reads(path: str) -> None:
    with pytest.raises(ValueError, match="absolute path of") as refused:
        check_cache_path(path)
    assert nearest_cache_path(path) in str(refused.value)
    with pytest.raises(ValueError, match="absolute path of"):
        neuron_environment("ml.trn1.32xlarge", cores=32, has_efa=False, cache_path=path)


@given(st.text(max_size=40))
def test_a_path_near_any_text_is_one_that_can_be_used(text: str) -> None:
    check_cache_path(nearest_cache_path(text))


@given(st.from_regex(r"(/[A-Za-z0-9_-]+){1,4}", fullmatch=True))
def test_the_cache_moves_as_a_whole_and_nothing_that_is_compiled_with_changes(path: str) -> None:
    before = environment()
    after = with_cache_path(before, path)
    assert set(cache_paths(after).values()) == {path}
    assert compiled_with(after) == compiled_with(before)
    assert {name for name in before if before[name] != after[name]} <= {"NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL"}


def test_an_option_and_its_value_count_the_same_with_a_blank_and_with_an_equals_sign() -> None:
    apart = {"NEURON_CC_FLAGS": "--model-type transformer -O2 --cache_dir /c --enable-saturate-infinity"}
    joined = {"NEURON_CC_FLAGS": "--model-type=transformer -O2 --cache_dir=/d --enable-saturate-infinity"}
    assert compiled_with(apart) == compiled_with(joined)
    assert (cache_paths(apart), cache_paths(joined)) == ({"NEURON_CC_FLAGS": "/c"}, {"NEURON_CC_FLAGS": "/d"})


def test_what_decides_what_is_compiled_leaves_out_what_a_graph_runs_with() -> None:
    kept = compiled_with({**environment(), "NEURON_EXTRACT_GRAPHS_ONLY": "1", "XLA_IR_DEBUG": "1", "HOME": "/tmp"})
    assert kept == {
        "NEURON_RT_NUM_CORES": "32",
        "NEURON_CC_FLAGS": f"{FLAGS} --target=trn1",
        "NEURON_FUSE_SOFTMAX": "1",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
        "XLA_IR_DEBUG": "1",
    }
