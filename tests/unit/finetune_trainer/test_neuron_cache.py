"""The cache of compiled graphs: what its keys depend on, what a manifest promises, and whose locks are removed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron_runs import neuron_config
from neuron_vendor import graphs

from finetune_trainer import contract
from finetune_trainer.contract import ArtifactRef, StageConfig, graph_spec, stage_digest
from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.neuron_cache import (
    CacheKey,
    NeuronCache,
    cache_folder,
    compiler_environment,
    graph_name,
    key_differences,
    training_key,
)

ENVIRONMENT = {"NEURON_CC_FLAGS": "--model-type=transformer --cache_dir=/c", "NEURON_FUSE_SOFTMAX": "1"}
GRAPH = "neuronxcc-2.21.33363.0+82129205/MODULE_1+ab"


def changed(config: StageConfig, part: str, **values: Any) -> StageConfig:
    """`config` with fields of one part of its spec replaced."""
    return replace(config, spec={**config.spec, part: {**config.spec[part], **values}})


KEPT: dict[str, Callable[[StageConfig], StageConfig]] = {
    "another learning rate": lambda config: changed(config, "training", learningRate=0.5),
    "another schedule": lambda config: changed(config, "training", learningRateSchedule="linear"),
    "another length": lambda config: changed(config, "training", maxSteps=9),
    "another checkpoint interval": lambda config: changed(config, "training", checkpointEverySteps=1),
    "other checkpoints kept": lambda config: changed(config, "training", keepCheckpoints=7),
    "another log interval": lambda config: changed(config, "training", logEverySteps=5),
    "another seed": lambda config: changed(config, "training", seed=1),
    "evaluation never": lambda config: changed(config, "training", evaluateEverySteps=None),
}
CHANGED: dict[str, Callable[[StageConfig], StageConfig]] = {
    "another micro batch": lambda config: changed(config, "training", microBatchSize=2),
    "another accumulation": lambda config: changed(config, "training", gradientAccumulationSteps=4),
    "another precision": lambda config: changed(config, "training", precision="fp32"),
    "recomputed activations": lambda config: changed(config, "training", gradientCheckpointing=True),
    "no clipping": lambda config: changed(config, "training", maxGradNorm=0),
    "no weight decay": lambda config: changed(config, "training", weightDecay=0),
    "evaluation": lambda config: changed(config, "training", evaluateEverySteps=5),
    "another rank of LoRA": lambda config: changed(config, "method", lora={"rank": 8}),
    "other chips": lambda config: changed(config, "accelerator", instanceType="ml.trn2.48xlarge"),
    "another image": lambda config: replace(config, image="trainer:other"),
    "another world": lambda config: replace(config, parallelism={**config.parallelism, "dataParallelSize": 4}),
    "a field of a later release": lambda config: changed(config, "training", sequenceParallel=True),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_what_changes_no_graph_compiles_nothing_again(
    workspace: Path, change: Callable[[StageConfig], StageConfig]
) -> None:
    config = neuron_config(workspace)
    other = change(config)
    assert stage_digest(other) == stage_digest(config)
    assert training_key(other, ENVIRONMENT) == training_key(config, ENVIRONMENT)
    trained = [stage_digest(replace(each, stage=contract.TRAIN)) for each in (config, other)]
    assert trained[0] != trained[1], "train's digest covers all that it reads"


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_what_changes_a_graph_has_another_digest_and_another_key(
    workspace: Path, change: Callable[[StageConfig], StageConfig]
) -> None:
    config = neuron_config(workspace)
    other = change(config)
    assert stage_digest(other) != stage_digest(config)
    assert training_key(other, ENVIRONMENT).name != training_key(config, ENVIRONMENT).name


def test_the_interval_of_evaluation_is_no_part_of_its_graph(workspace: Path) -> None:
    one, other = (changed(neuron_config(workspace), "training", evaluateEverySteps=each) for each in (5, 50))
    assert stage_digest(one) == stage_digest(other)
    assert graph_spec(one.spec)["training"]["evaluates"] is True


def test_how_long_the_rate_warms_up_is_no_part_of_a_graph_and_that_it_does_is(workspace: Path) -> None:
    none, short, long = (changed(neuron_config(workspace), "training", warmupSteps=each) for each in (0, 5, 50))
    assert stage_digest(short) == stage_digest(long) != stage_digest(none), "a first rate of 0 is a constant"
    assert training_key(short, ENVIRONMENT) == training_key(long, ENVIRONMENT) != training_key(none, ENVIRONMENT)


def test_weights_and_rows_are_no_part_of_the_key_but_their_shapes_are(workspace: Path) -> None:
    key = training_key(neuron_config(workspace), ENVIRONMENT)
    elsewhere = neuron_config(workspace, model={"_name_or_path": "other/tiny"}, data={"maxSteps": 900})
    assert training_key(elsewhere, ENVIRONMENT) == key
    for other in (
        neuron_config(workspace, model={"hidden_size": 128}),
        neuron_config(workspace, data={"rowLength": 256}),
        neuron_config(workspace, data={"packing": "wrapped"}),
    ):
        assert training_key(other, ENVIRONMENT) != key


def test_the_compilers_flags_and_variables_are_part_of_the_key_and_the_caches_place_is_not(workspace: Path) -> None:
    config = neuron_config(workspace)
    key = training_key(config, ENVIRONMENT)
    moved = {**ENVIRONMENT, "NEURON_CC_FLAGS": "--model-type=transformer --cache_dir=/elsewhere"}
    assert training_key(config, moved) == key
    for name, value in (("NEURON_CC_FLAGS", "--model-type=unet --cache_dir=/c"), ("NEURON_FUSE_SOFTMAX", "0")):
        other = training_key(config, {**ENVIRONMENT, name: value})
        assert key_differences(key.parts, other.parts) == [
            f"environment.{name} was {json.dumps(key.parts['environment'][name])} and is "
            f"{json.dumps(other.parts['environment'][name])}"
        ]


def test_training_keeps_its_digest_and_so_its_checkpoints_whatever_was_compiled(workspace: Path) -> None:
    config = neuron_config(workspace, stage=contract.TRAIN)
    digests = {stage_digest(config)}
    for word in ("one", "other"):
        inputs = {**config.inputs, contract.COMPILE: ArtifactRef("path", contract.digest_of(word))}
        digests.add(stage_digest(replace(config, inputs=inputs)))
    assert len(digests) == 1


def test_a_model_without_its_configuration_is_named(workspace: Path) -> None:
    config = neuron_config(workspace)
    (config.input_path(contract.MODEL_INPUT) / "config.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"config.json is missing"):
        training_key(config, ENVIRONMENT)


# ---- the environment


def test_the_environment_keeps_what_the_operator_says_and_has_failed_graphs_tried_again(tmp_path: Path) -> None:
    found = compiler_environment(
        {"NEURON_CC_FLAGS": "--model-type transformer --cache_dir=/other/c", "X": "y"}, tmp_path
    )
    assert found["NEURON_CC_FLAGS"].split() == [
        "--model-type=transformer",
        "--retry_failed_compilation",
        "--cache_dir=/other/c",
    ]
    assert (found["NEURON_COMPILE_CACHE_URL"], found["X"]) == ("/other/c", "y")
    assert found["NEURON_PARALLEL_COMPILE_MAX_RETRIES"] == "1"
    assert cache_folder(found) == Path("/other/c")
    assert compiler_environment(found, tmp_path) == found, "once is enough"


def test_without_a_word_of_the_operator_the_cache_is_on_the_workspace() -> None:
    found = compiler_environment({}, Path("/workspace"))
    assert cache_folder(found) == Path("/workspace/finetune/neuron-cache")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NEURON_CC_FLAGS": "--cache_dir=/fsx/llama3.1"}, "'/fsx/llama3.1'.*use /fsx/llama3-1"),
        (
            {"NEURON_CC_FLAGS": "--cache_dir=/a", "NEURON_COMPILE_CACHE_URL": "/b"},
            "/a in NEURON_CC_FLAGS and /b in NEURON_COMPILE_CACHE_URL",
        ),
    ],
    ids=["a path with a dot", "two paths"],
)
def test_a_cache_that_the_vendors_tools_would_not_find_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compiler_environment(environment, Path("/workspace"))


# ---- manifests


def compiled(cache: NeuronCache, name: str = GRAPH, content: str = "neff") -> str:
    entry = cache.folder / name
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "model.neff").write_text(content)
    (entry / "model.done").touch()
    return name


def test_a_manifest_says_what_was_compiled_and_notices_what_is_gone(tmp_path: Path) -> None:
    cache, key = NeuronCache(tmp_path), CacheKey({"a": 1})
    assert cache.find(key) is None
    cache.keep(key, [compiled(cache), compiled(cache, GRAPH + "c")], 12.5)
    found = cache.find(key)
    assert found is not None
    assert (dict(found.graphs), found.parts, found.seconds) == ({GRAPH: 4, GRAPH + "c": 4}, {"a": 1}, 12.5)
    assert cache.missing(found) == []
    (tmp_path / GRAPH / "model.neff").write_text("cut")
    (tmp_path / (GRAPH + "c") / "model.done").unlink()
    assert cache.missing(found) == [GRAPH, GRAPH + "c"]


def test_a_graph_that_is_not_compiled_is_never_promised(tmp_path: Path) -> None:
    cache = NeuronCache(tmp_path)
    (tmp_path / GRAPH).mkdir(parents=True)
    (tmp_path / GRAPH / "model.neff").touch()
    with pytest.raises(ValueError, match="is not compiled"):
        cache.keep(CacheKey({}), [GRAPH], 1)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"version": 9, "key": {}}', '{"version": 1, "key": {}, "graphs": [{"path": "../x", "bytes": 1}]}'],
    ids=["empty", "cut", "a list", "another version", "a path that leads outside"],
)
def test_a_broken_manifest_is_none(tmp_path: Path, text: str) -> None:
    cache, key = NeuronCache(tmp_path), CacheKey({})
    cache.keys_folder.mkdir()
    cache.manifest_path(key).write_text(text)
    assert cache.find(key) is None


def test_a_miss_is_explained_by_the_nearest_key(tmp_path: Path) -> None:
    cache, key = NeuronCache(tmp_path), CacheKey({"rows": {"length": 2048}, "image": "a", "spec": {"x": 1}})
    assert cache.explain_miss(key) == "nothing was compiled into this cache yet"
    cache.keep(CacheKey({"rows": {"length": 9}, "image": "z", "spec": {"x": 2}}), [], 1)
    cache.keep(CacheKey({"rows": {"length": 1024}, "image": "a", "spec": {"x": 1}}), [], 1)
    assert cache.explain_miss(key) == "rows.length was 1024 and is 2048"


values = st.recursive(
    st.one_of(st.integers(0, 3), st.text("ab", max_size=2), st.booleans()),
    lambda inner: st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text("xyz", min_size=1, max_size=2), values), st.dictionaries(st.text("xyz", min_size=1), values)
)
def test_keys_differ_where_and_only_where_a_difference_is_told(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert bool(key_differences(old, new)) == (old != new)
    assert len(key_differences(old, new)) == len(key_differences(new, old))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"/any/where/{GRAPH}/model.neff", GRAPH),
        (f"s3://bucket/prefix/{GRAPH}/model.hlo_module.pb", GRAPH),
        ("/tmp/neuroncc_compile_workdir/0/model.MODULE_1+ab.neff", None),
    ],
    ids=["a file of the cache", "a cache elsewhere", "a file that is in no cache"],
)
def test_a_graph_is_known_by_the_last_folders_of_its_path(path: str, name: str | None) -> None:
    assert graph_name(path) == name


# ---- locks


def locked(cache: NeuronCache) -> Path:
    entry = cache.folder / GRAPH
    entry.mkdir(parents=True)
    assert graphs.take_lock(entry)
    return entry


def test_a_dead_compilers_lock_is_removed_where_nobody_compiles(tmp_path: Path) -> None:
    cache = NeuronCache(tmp_path)
    locked(cache)
    assert cache.is_locked(GRAPH)
    assert cache.clear_dead_locks() == [GRAPH]
    assert not cache.is_locked(GRAPH)


def test_no_lock_is_removed_while_anybody_compiles_and_a_killed_process_is_nobody(tmp_path: Path) -> None:
    cache = NeuronCache(tmp_path)
    locked(cache)
    code = (
        "import sys, pathlib; from finetune_trainer.neuron_cache import NeuronCache\n"
        "with NeuronCache(pathlib.Path(sys.argv[1])).compiling(): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with cache.compiling():
            pass  # several compile at a time
        assert cache.clear_dead_locks() == []
        holder.kill()
    assert cache.clear_dead_locks() == [GRAPH]


def test_a_failed_graph_has_the_compilers_words(tmp_path: Path) -> None:
    cache = NeuronCache(tmp_path)
    entry = cache.folder / GRAPH
    entry.mkdir(parents=True)
    assert cache.failure(GRAPH) is None
    (entry / "model.log").write_text("[NLA001] no")
    assert cache.failure(GRAPH) == "[NLA001] no"
    compiled(cache)
    assert cache.failure(GRAPH) is None, "a graph that was compiled later did not fail"
