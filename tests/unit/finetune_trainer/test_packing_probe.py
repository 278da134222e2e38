"""The check at training's start that packed documents do not see each other, on rows as prepare writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from train_runs import METHOD
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetune_trainer import training
from finetune_trainer.artifacts import new_artifact
from finetune_trainer.backends import ModelPlan
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows, open_rows
from finetune_trainer.errors import UserError
from finetune_trainer.packing import pack_documents
from finetune_trainer.rows import ROWS_FILE, write_order, write_rows
from finetune_trainer.spool import DocumentSpool
from finetune_trainer.training import TrainingPlan

LENGTH = 32
LENGTHS = [5, 1, 40, 2, 9, 17, 3, 11, 30, 8, 12]


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[[str], PreparedRows]:
    def make(packing: str, lengths: list[int] = LENGTHS) -> PreparedRows:
        some = lengths if packing == "wrapped" else [length for length in lengths if length <= LENGTH]
        random = np.random.RandomState(1)
        with DocumentSpool(tmp_path) as spool, new_artifact(tmp_path / packing, "prepare") as writer:
            for length in some:
                spool.add(random.randint(3, 300, length).tolist(), [(1, length)] if length > 1 else [])
            packed = pack_documents(packing, spool.lengths, LENGTH)
            write_rows(writer, ROWS_FILE, spool, packed, row_length=LENGTH, pad=2)
            write_order(writer, [np.zeros(1, dtype=np.int32)], 1)
            writer.write("data.json", json.dumps({"maxSteps": 1}).encode())
        return open_rows(tmp_path / packing, 1)

    return make


@pytest.fixture
def make_backend(tiny_model: Path) -> Iterator[Callable[..., TorchBackend]]:
    backends = []

    def make(
        folder: Path = tiny_model, *, precision: str = "fp32", modules: tuple[str, ...] = ("q_proj", "v_proj")
    ) -> TorchBackend:
        backend = TorchBackend("cpu")
        backend.start()
        backends.append(backend)
        lora: dict[str, Any] = {**METHOD["lora"], "targetModules": list(modules)}  # type: ignore[dict-item]
        method = {**METHOD, "lora": lora}
        backend.build(ModelPlan(folder, method, precision=precision, weight_decay=0.0, seed=3, keep_masks=True))
        return backend

    yield make
    for backend in backends:
        backend.stop()


def plan(precision: str = "fp32") -> TrainingPlan:
    return TrainingPlan(
        total_steps=1,
        global_batch_size=1,
        micro_batch_size=1,
        learning_rate=0.01,
        schedule="constant",
        warmup_steps=0,
        max_gradient_norm=1.0,
        seed=3,
        precision=precision,
        checkpoint_every_steps=1,
        keep_checkpoints=1,
        log_every_steps=1,
        identity={},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packing", ["bestFit", "wrapped"])
def test_rows_of_each_packing_pass(
    make_backend: Callable[..., TorchBackend], make_rows: Callable[..., PreparedRows], packing: str, precision: str
) -> None:
    rows = make_rows(packing)
    row = rows.first_packed_row()
    assert row is not None
    assert all((rows.segment_ids[row] == segment).sum() >= 8 for segment in (1, 2))
    training.check_packing(make_backend(precision=precision), plan(precision), rows, row)


def test_a_model_with_alibi_passes(
    make_backend: Callable[..., TorchBackend],
    make_rows: Callable[..., PreparedRows],
    tiny_model_module: ModuleType,
    tmp_path: Path,
) -> None:
    bloom = tiny_model_module.write_tiny_bloom(tmp_path / "bloom")
    rows = make_rows("wrapped")
    backend = make_backend(bloom, modules=("query_key_value",))
    training.check_packing(backend, plan(), rows, rows.first_packed_row() or 0)


def look_everywhere_before(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention that knows nothing of masks, as a fast kernel may be that only does causal rows."""
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})


@pytest.mark.parametrize("packing", ["bestFit", "wrapped"])
def test_attention_that_does_not_heed_the_mask_is_refused_before_the_first_step(
    make_backend: Callable[..., TorchBackend], make_rows: Callable[..., PreparedRows], packing: str
) -> None:
    AttentionInterface.register("look_everywhere_before", look_everywhere_before)
    rows, backend = make_rows(packing), make_backend()
    backend._model.get_base_model().config._attn_implementation = "look_everywhere_before"
    row = rows.first_packed_row() or 0
    with pytest.raises(UserError) as caught:
        training.check_packing(backend, plan(), rows, row)
    assert caught.value.reason == "PackingContaminates"
    assert f"logits of the second document of row {row} differ by" in caught.value.message
    assert "set dataset.packing: none" in caught.value.message


def test_a_model_that_takes_no_such_mask_is_refused_with_its_own_words(
    make_backend: Callable[..., TorchBackend], make_rows: Callable[..., PreparedRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, backend = make_rows("bestFit"), make_backend()

    def forward(**_arguments: Any) -> None:
        raise ValueError("not enough values to unpack (expected 2)")

    monkeypatch.setattr(backend._model, "forward", forward)
    with pytest.raises(UserError, match=r"cannot keep packed documents apart \(not enough values") as caught:
        training.check_packing(backend, plan(), rows, rows.first_packed_row() or 0)
    assert caught.value.reason == "PackingNotSupported"


def test_without_packing_there_is_nothing_to_prove(make_rows: Callable[..., PreparedRows]) -> None:
    assert make_rows("none").first_packed_row() is None


def test_a_row_of_one_document_proves_nothing(
    make_backend: Callable[..., TorchBackend], make_rows: Callable[..., PreparedRows]
) -> None:
    with pytest.raises(ValueError, match="row 0 holds fewer than two documents"):
        training.check_packing(make_backend(), plan(), make_rows("none"), 0)


def test_where_all_documents_are_short_the_first_row_with_two_is_taken(make_rows: Callable[..., PreparedRows]) -> None:
    rows = make_rows("wrapped", [LENGTH, LENGTH, 3, 2, 4])
    assert rows.first_packed_row() == 2
