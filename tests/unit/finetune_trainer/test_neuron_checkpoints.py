"""The vendor's own checkpoints bit for bit, and every kind of damage to them named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuron_shards import whole_shapes, write_checkpoint
from safetensors.torch import load_file

from finetune_trainer.errors import CorruptArtifact, UserError
from finetune_trainer.neuron_checkpoints import NeuronCheckpoint, open_neuron_checkpoint
from finetune_trainer.neuron_tensors import NeuronTensor

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "neuron"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
TRAINED_APART = "full-zero1-tp2-dp2"
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def whole(tensor: NeuronTensor) -> torch.Tensor:
    data = bytearray(b"".join(tensor.chunks()))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def expected(name: str) -> dict[str, torch.Tensor]:
    folder = FIXTURES / name / "expected"
    file = folder / ("adapter_model.safetensors" if name.startswith("lora") else "model.safetensors")
    tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_the_vendors_checkpoints_come_back_bit_for_bit(name: str) -> None:
    is_apart = name == TRAINED_APART
    checkpoint = open_neuron_checkpoint(FIXTURES / name / "checkpoint", contents=True, first_copies=is_apart)
    parameters = checkpoint.parameters()
    tensors = expected(name)
    assert parameters.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert TORCH_DTYPES[parameters[key].dtype] == tensor.dtype
        assert torch.equal(whole(parameters[key]), tensor), key
    assert (checkpoint.apart or set()) == ({key for key in tensors if "norm" in key} if is_apart else set())


def test_the_vendors_ranks_that_trained_apart_are_refused_where_it_takes_the_first() -> None:
    """In bf16 without sequence parallelism its backward of a column parallel layer sums a copy and drops the sum."""
    parameters = open_neuron_checkpoint(FIXTURES / TRAINED_APART / "checkpoint").parameters()
    for key, tensor in parameters.items():
        if "norm" in key:
            with pytest.raises(UserError, match="in bf16 without sequence parallelism") as caught:
                whole(tensor)
            assert caught.value.reason == "DivergingCopies"
        else:
            whole(tensor)


def test_a_pipeline_ranks_stale_keys_are_left_out_and_counted() -> None:
    checkpoint = open_neuron_checkpoint(FIXTURES / "lora-pp2-vendor-writer" / "checkpoint")
    assert (checkpoint.tp_size, checkpoint.pp_size, checkpoint.adapter) == (1, 2, "default")
    # Of each layer: a pair for q, k, v, o, down, and one for gate and up together, in the other rank's file too.
    assert checkpoint.ignored == 2 * 12


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A fixture's checkpoint, to be damaged; returns the folder of its shards."""

    def copied(name: str) -> Path:
        folder = tmp_path / "checkpoint-400"
        shutil.copytree(FIXTURES / name / "checkpoint", folder)
        return next(
            path for path in (folder / "shards", folder / "adapter_default" / "adapter_shards") if path.is_dir()
        )

    return copied


def read_all(checkpoint: NeuronCheckpoint) -> None:
    for tensor in checkpoint.parameters().values():
        whole(tensor)


def rank_file(shards: Path, tp_rank: int, pp_rank: int = 0) -> Path:
    return shards / "model" / f"dp_rank_00_tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:02d}.pt"


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a plain rank file and write it again."""
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


def without_rank(shards: Path) -> None:
    rank_file(shards, 2).unlink()


def without_last_rank(shards: Path) -> None:
    rank_file(shards, 3).unlink()


def without_half_the_ranks(shards: Path) -> None:
    for tp_rank in (2, 3):
        rank_file(shards, tp_rank).unlink()


def truncated(shards: Path) -> None:
    cut(rank_file(shards, 1))


def emptied(shards: Path) -> None:
    rank_file(shards, 1).write_bytes(b"")


def with_a_foreign_file(shards: Path) -> None:
    (shards / "model" / "notes.txt").write_text("mine")


def with_another_data_parallel_rank(shards: Path) -> None:
    shutil.copy(rank_file(shards, 0), shards / "model" / "dp_rank_01_tp_rank_00_pp_rank_00.pt")


def with_another_checkpoints_file(shards: Path) -> None:
    torch.save({"model.layers.7.mlp.down_proj.weight": torch.zeros(2, 2)}, rank_file(shards, 1))


def with_another_shape(shards: Path) -> None:
    change(rank_file(shards, 1), lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))


def with_one_key_more(shards: Path) -> None:
    for tp_rank in range(4):
        change(rank_file(shards, tp_rank), lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))


def with_one_key_less(shards: Path) -> None:
    for tp_rank in range(4):
        change(rank_file(shards, tp_rank), lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))


def with_metadata_of_two_ranks(shards: Path) -> None:
    path = shards / "mp_metadata_pp_rank_0.json"
    path.write_text(
        path.read_text().replace('"num_partitions": 4', '"num_partitions": 2').replace('"tp_size": 4', '"tp_size": 2')
    )


def with_metadata_of_eight_ranks(shards: Path) -> None:
    path = shards / "mp_metadata_pp_rank_0.json"
    path.write_text(
        path.read_text().replace('"num_partitions": 4', '"num_partitions": 8').replace('"tp_size": 4', '"tp_size": 8')
    )


def without_metadata(shards: Path) -> None:
    (shards / "mp_metadata_pp_rank_0.json").unlink()


def unfinished(shards: Path) -> None:
    (shards / "done").unlink()


def with_no_tensors(shards: Path) -> None:
    torch.save([torch.zeros(2)], rank_file(shards, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_rank, "lacks dp_rank_00_tp_rank_02_pp_rank_00.pt"),
        (without_last_rank, "lacks dp_rank_00_tp_rank_03_pp_rank_00.pt"),
        (without_half_the_ranks, "lacks dp_rank_00_tp_rank_02_pp_rank_00.pt, dp_rank_00_tp_rank_03"),
        (truncated, "dp_rank_00_tp_rank_01_pp_rank_00.pt is damaged"),
        (emptied, "dp_rank_00_tp_rank_01_pp_rank_00.pt is damaged"),
        (with_a_foreign_file, "notes.txt is foreign"),
        (with_another_data_parallel_rank, "dp_rank_01_tp_rank_00_pp_rank_00.pt is foreign"),
        (with_another_checkpoints_file, "tensor parallel rank 0 holds F32 .* rank 1 nothing"),
        (with_another_shape, r"'model.norm.weight' tensor parallel rank 0 holds F32 \[64\], rank 1 F32 \[3\]"),
        (with_one_key_more, "does not know model.extra.weight"),
        (with_one_key_less, "promises model.layers.1.mlp.down_proj.weight"),
        (with_metadata_of_two_ranks, "tensor parallel rank 2, and .* is of tensor parallel size 2"),
        (with_metadata_of_eight_ranks, "lacks dp_rank_00_tp_rank_04_pp_rank_00.pt.* tensor parallel size 8"),
        (without_metadata, "lacks mp_metadata_pp_rank_0.json"),
        (unfinished, "was never finished"),
        (with_no_tensors, "holds no tensors by name"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_refused_by_name(
    copy: Callable[[str], Path], damage: Callable[[Path], None], words: str
) -> None:
    shards = copy("full-tp4-gqa")
    damage(shards)
    with pytest.raises(CorruptArtifact, match=words):
        open_neuron_checkpoint(shards.parent, contents=True)


@pytest.mark.parametrize("damage", [truncated, emptied], ids=lambda damage: damage.__name__)
def test_a_cut_file_is_named_where_checksums_are_not_compared_again(
    copy: Callable[[str], Path], damage: Callable[[Path], None]
) -> None:
    shards = copy("full-tp4-gqa")
    damage(shards)
    with pytest.raises(CorruptArtifact, match=r"tp_rank_01_pp_rank_00.pt is no whole file of torch.save"):
        open_neuron_checkpoint(shards.parent)


def tensor_file(shards: Path, number: int, tp_rank: int = 1) -> Path:
    path = rank_file(shards, tp_rank)
    return path.with_name(path.name + ".tensors") / f"tensor_{number}.pt"


def without_tensor(shards: Path) -> None:
    tensor_file(shards, 3).unlink()


def with_foreign_tensor(shards: Path) -> None:
    shutil.copy(tensor_file(shards, 3), tensor_file(shards, 300))


def with_another_tensor(shards: Path) -> None:
    torch.save(torch.zeros(7), tensor_file(shards, 3))


def with_cut_tensor(shards: Path) -> None:
    cut(tensor_file(shards, 3))


def with_cut_index(shards: Path) -> None:
    cut(rank_file(shards, 1), 0.7)


def with_another_info(shards: Path) -> None:
    info = rank_file(shards, 1)
    torch.save({0: {"dtype": torch.float32, "shape": torch.Size([2])}}, info.with_name(info.name + ".info.pt"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_tensor, "lacks tensor_3.pt"),
        (with_foreign_tensor, "tensor_300.pt is foreign"),
        (with_another_tensor, r"tensor_3.pt holds F32 \[7\], expected F32"),
        (with_cut_tensor, r"tensor_3.pt is no whole file of torch.save"),
        (with_cut_index, r"tp_rank_01_pp_rank_00.pt is no whole file"),
        (with_another_info, r"info.pt does not describe the"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_tensor_file_is_refused_by_name(
    copy: Callable[[str], Path], damage: Callable[[Path], None], words: str
) -> None:
    shards = copy("lora-all-tp4-gqa-xser")
    damage(shards)
    with pytest.raises(CorruptArtifact, match=words):
        read_all(open_neuron_checkpoint(shards.parent))


@pytest.mark.parametrize("name", ["full-tp4-gqa", "lora-all-tp4-gqa-xser"], ids=["plain", "xser"])
def test_one_changed_bit_is_found_where_torch_loads_it_silently(copy: Callable[[str], Path], name: str) -> None:
    shards = copy(name)
    path = rank_file(shards, 1) if name == "full-tp4-gqa" else tensor_file(shards, 0)
    data = bytearray(path.read_bytes())
    value = torch.load(path, weights_only=True)
    tensor = next(iter(value.values())) if isinstance(value, dict) else value
    at = data.find(tensor.contiguous().view(torch.uint8).numpy().tobytes()[:64])
    data[at + 5] ^= 1
    path.write_bytes(data)
    open_neuron_checkpoint(shards.parent)
    with pytest.raises(CorruptArtifact, match=f"{path.name} is damaged .the checksum of .* is wrong"):
        open_neuron_checkpoint(shards.parent, contents=True)


def test_an_old_checkpoint_without_types_and_shapes_is_read_from_its_tensors(copy: Callable[[str], Path]) -> None:
    shards = copy("lora-qv-tp2-xser")
    for path in shards.rglob("*.info.pt"):
        path.unlink()
    found = open_neuron_checkpoint(shards.parent).parameters()
    for key, tensor in expected("lora-qv-tp2-xser").items():
        assert torch.equal(whole(found[key]), tensor), key


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["the rank's file", "a tensor's file", "the metadata", "a legacy pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(
    copy: Callable[[str], Path], tmp_path: Path, where: str
) -> None:
    shards, mark = copy("lora-qv-tp2-xser"), tmp_path / "it ran"
    evil = {"x": Evil(tmp_path / "ran")}
    if where == "the rank's file":
        torch.save(evil, rank_file(shards, 1))
    elif where == "a tensor's file":
        torch.save(evil, tensor_file(shards, 0))
    elif where == "the metadata":
        torch.save(evil, shards / "mp_metadata_pp_rank_0.pt")
    else:
        torch.save(evil, rank_file(shards, 1), _use_new_zipfile_serialization=False)
    error = CorruptArtifact if where == "a legacy pickle" else UserError
    with pytest.raises(error) as caught:
        read_all(open_neuron_checkpoint(shards.parent))
    if error is UserError:
        assert caught.value.reason == "UnsafePickle"
        assert "could run code when it is read" in caught.value.message
    assert not mark.exists()
    assert not (tmp_path / "ran").exists()


def changed_rank(shards: Path, tp_rank: int, key: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key] + (torch.arange(len(tensors[key])) == 1).reshape(
            -1, *[1] * (tensors[key].dim() - 1)
        )

    change(rank_file(shards, tp_rank), edit)


@pytest.mark.parametrize(
    ("key", "name", "ranks"),
    [
        # Two KV heads on four ranks: rank 2 has the copy of rank 0, rank 3 that of rank 1.
        ("model.layers.1.self_attn.qkv_proj.weight_k", "model.layers.1.self_attn.k_proj.weight", "1 and 3"),
        ("model.layers.0.self_attn.qkv_proj.weight_v", "model.layers.0.self_attn.v_proj.weight", "1 and 3"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight", "0 and 3"),
    ],
    ids=["keys", "values", "a norm"],
)
def test_ranks_that_trained_apart_are_named(copy: Callable[[str], Path], key: str, name: str, ranks: str) -> None:
    shards = copy("full-tp4-gqa")
    changed_rank(shards, 3, key)
    parameters = open_neuron_checkpoint(shards.parent).parameters()
    with pytest.raises(
        UserError, match=f"'{name}' is not the same on tensor parallel ranks {ranks} .row 1 of"
    ) as caught:
        whole(parameters[name])
    assert caught.value.reason == "DivergingCopies"
    others = [tensor for other, tensor in parameters.items() if other != name]
    for tensor in others:
        whole(tensor)


def test_an_a_that_the_ranks_do_not_share_is_named(copy: Callable[[str], Path]) -> None:
    shards = copy("lora-all-tp4-gqa")
    changed_rank(shards, 2, "base_model.model.model.layers.0.mlp.gate_up_proj.lora_A.weight")
    parameters = open_neuron_checkpoint(shards.parent).parameters()
    with pytest.raises(UserError, match=r"up_proj.lora_A.weight' is not the same on tensor parallel ranks 0 and 2"):
        whole(parameters["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"])


TIED = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 8, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_two_ends_of_a_pipeline_that_share_an_embedding_are_compared(tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape) for name, shape in whole_shapes(TIED).items()}
    shards = write_checkpoint(tmp_path, tensors, TIED, tp=2, pp=2, xser=False)
    parameters = open_neuron_checkpoint(tmp_path).parameters()
    assert "lm_head.weight" not in parameters
    assert torch.equal(whole(parameters["model.embed_tokens.weight"]), tensors["model.embed_tokens.weight"])
    change(rank_file(shards, 1, 1), lambda local: local["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="ranks 1 and 1 of pipeline ranks 0 and 1"):
        whole(open_neuron_checkpoint(tmp_path).parameters()["model.embed_tokens.weight"])


def test_the_files_of_a_pipeline_rank_that_are_missing_are_noticed(copy: Callable[[str], Path]) -> None:
    shards = copy("lora-pp2-vendor-writer")
    for path in list((shards / "model").glob("*pp_rank_01.pt*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CorruptArtifact, match="lacks dp_rank_00_tp_rank_00_pp_rank_01.pt"):
        open_neuron_checkpoint(shards.parent)
    (shards / "mp_metadata_pp_rank_1.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"no pipeline rank has parameters of .*layers.1"):
        open_neuron_checkpoint(shards.parent)


def test_pipeline_files_without_their_metadata_are_noticed(copy: Callable[[str], Path]) -> None:
    shards = copy("lora-pp2-vendor-writer")
    (shards / "mp_metadata_pp_rank_1.json").unlink()
    with pytest.raises(CorruptArtifact, match=r"is of pipeline rank 1, and there is no mp_metadata_pp_rank_1.json"):
        open_neuron_checkpoint(shards.parent)


@pytest.mark.parametrize("name", ["lora-qv-tp2-xser", "full-tp4-gqa"])
def test_any_folder_of_a_checkpoint_may_be_named(copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    shards = copy(name)
    for folder in {tmp_path / "checkpoint-400", shards.parent, shards}:
        checkpoint = open_neuron_checkpoint(folder)
        assert (checkpoint.shards, checkpoint.step) == (shards, 400)
        assert checkpoint.adapter == ("default" if name.startswith("lora") else None)


def test_what_is_no_checkpoint_is_said(copy: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has neither adapter_shards nor shards in it"):
        open_neuron_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        open_neuron_checkpoint(tmp_path / "nothing")
    shards = copy("lora-qv-tp2-xser")
    shutil.copytree(shards.parent, tmp_path / "checkpoint-400" / "adapter_other")
    with pytest.raises(UserError, match=r"several adapters .adapter_default, adapter_other"):
        open_neuron_checkpoint(tmp_path / "checkpoint-400")
    (shards / "model" / "dp_rank_00_ep_rank_00_tp_rank_00_pp_rank_00.pt").write_bytes(b"")
    with pytest.raises(UserError, match="expert parallelism"):
        open_neuron_checkpoint(shards)


def test_a_tensor_of_another_adapter_is_not_this_ones(tmp_path: Path) -> None:
    adapter = {"r": 2, "target_modules": ["q_proj"]}
    shapes = whole_shapes(TIED, adapter)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    shards = write_checkpoint(tmp_path, tensors, TIED, tp=2, adapter_config=adapter, xser=False)
    path = shards / "mp_metadata_pp_rank_0.json"
    metadata = json.loads(path.read_text())
    for name, entry in list(metadata["parameters"].items()):
        if ".default." in name:
            metadata["parameters"][name.replace(".default.", ".second.")] = entry
    path.write_text(json.dumps(metadata))
    assert open_neuron_checkpoint(tmp_path).parameters().keys() == shapes.keys()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("xser", [False, True], ids=["plain", "xser"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, xser: bool) -> None:
    """What was read of a mapped file is given back: far less than the model is resident at any time."""
    config = TIED | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    tensors = {name: torch.zeros(shape) for name, shape in whole_shapes(config).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_checkpoint(tmp_path, tensors, config, tp=2, xser=xser)
    del tensors
    before = most = resident_bytes()
    for tensor in open_neuron_checkpoint(tmp_path).parameters().values():
        for _ in tensor.chunks():
            most = max(most, resident_bytes())
    assert total > 45 << 20
    assert most - before < 20 << 20


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200) | st.builds(lambda data: b"PK\x03\x04" + data, st.binary(max_size=100)),
    st.integers(0, 3000),
)
def test_any_bytes_in_a_file_are_a_named_damage(tmp_path: Path, data: bytes, at: int) -> None:
    """Whole files of any bytes, and whole ones with some bytes overwritten anywhere."""
    folder = tmp_path / "checkpoint-1"
    if not folder.exists():
        shutil.copytree(FIXTURES / "lora-qv-tp2-xser" / "checkpoint", folder)
    path = rank_file(folder / "adapter_default" / "adapter_shards", 1)
    before = path.read_bytes()
    for content in (data, before[:at] + data + before[at + len(data) :]):
        path.write_bytes(content)
        try:
            read_all(open_neuron_checkpoint(folder))
        except (CorruptArtifact, UserError) as error:
            assert "adapter_shards" in error.message  # noqa: PT017
    path.write_bytes(before)
