"""The loop and the torch backend in one process: gradients, schedules, rows, packing, health of the loss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from train_runs import METHOD, make_rows, train_config, write_prepared

from finetune_trainer import contract, training
from finetune_trainer.backends import IGNORED, MicroBatch, ModelPlan
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows, open_rows
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.progress import Progress, ProgressPoster
from finetune_trainer.training import TrainingPlan, chunk_seed, learning_rate

NO_DROPOUT: dict[str, Any] = {**METHOD, "lora": {**METHOD["lora"], "dropout": 0.0}}  # type: ignore[dict-item]
GLOBAL_BATCH = 8


def make_plan(**changes: Any) -> TrainingPlan:
    plan = TrainingPlan(
        total_steps=4,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=2,
        learning_rate=0.01,
        schedule="linear",
        warmup_steps=0,
        max_gradient_norm=1.0,
        seed=3,
        precision="fp32",
        checkpoint_every_steps=2,
        keep_checkpoints=1,
        log_every_steps=1,
        identity={"data": "d"},
    )
    return replace(plan, **changes)


@pytest.fixture
def make_backend(tiny_model: Path) -> Callable[..., TorchBackend]:
    def make(*, keep_masks: bool = False, method: dict[str, Any] = NO_DROPOUT, precision: str = "fp32") -> TorchBackend:
        backend = TorchBackend("cpu")
        backend.start()
        backend.build(
            ModelPlan(
                folder=tiny_model, method=method, precision=precision, weight_decay=0.1, seed=3, keep_masks=keep_masks
            )
        )
        return backend

    return make


@pytest.fixture(params=[False, True], ids=["one document a row", "packed rows"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> PreparedRows:
    path = write_prepared(tmp_path / "prepared", steps=4, global_batch_size=GLOBAL_BATCH, packed=request.param)
    return open_rows(path, GLOBAL_BATCH)


def is_packed(rows: PreparedRows) -> bool:
    return rows.first_packed_row() is not None


def gradient(
    backend: TorchBackend, rows: PreparedRows, micro_batch_size: int, dp_size: int
) -> tuple[torch.Tensor, float]:
    """The summed gradient of step 0 and its loss when dp_size ranks share it; here one process plays all of them."""
    supervised = rows.counts(0).supervised
    for dp_rank in range(dp_size):
        for chunk, batch in rows.micro_batches(0, micro_batch_size, dp_rank, dp_size):
            backend.micro_step(batch, 1.0 / supervised, chunk_seed(3, 0, chunk))
    loss, _ = backend.reduce([0.0])
    summed = backend._flat[:-8].clone()
    backend._flat.zero_()
    return summed, loss


def test_the_gradient_is_the_same_however_the_global_batch_is_split(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows
) -> None:
    backend = make_backend(keep_masks=is_packed(rows))
    whole, loss = gradient(backend, rows, GLOBAL_BATCH, 1)
    assert float(whole.abs().max()) > 1e-4
    for micro_batch_size, dp_size in ((1, 1), (2, 1), (2, 2), (1, 4), (4, 2), (1, 8)):
        split, split_loss = gradient(backend, rows, micro_batch_size, dp_size)
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)
        assert split_loss == pytest.approx(loss, abs=1e-6)


def test_the_loss_is_the_mean_over_supervised_tokens_that_transformers_computes(
    make_backend: Callable[..., TorchBackend], tiny_model: Path, tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=1, global_batch_size=GLOBAL_BATCH), GLOBAL_BATCH)
    _, loss = gradient(make_backend(), rows, 2, 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    numbers = rows.rows_of(0)
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(rows.input_ids[numbers]).long(),
            attention_mask=torch.from_numpy((rows.segment_ids[numbers] != 0).astype(np.int64)),
            labels=torch.from_numpy(rows.labels[numbers]).long(),
        ).loss
    assert loss == pytest.approx(float(expected), abs=1e-5)


def test_rows_are_cut_into_the_same_chunks_for_every_number_of_ranks(rows: PreparedRows) -> None:
    def chunks(dp_size: int) -> dict[int, MicroBatch]:
        found = [pair for rank in range(dp_size) for pair in rows.micro_batches(1, 2, rank, dp_size)]
        assert len(found) == GLOBAL_BATCH // 2
        return dict(found)

    alone = chunks(1)
    for dp_size in (2, 4):
        shared = chunks(dp_size)
        assert alone.keys() == shared.keys()
        assert all((alone[key].input_ids == shared[key].input_ids).all() for key in alone)


def test_targets_are_the_next_supervised_token_of_the_same_document() -> None:
    rows = PreparedRows(
        input_ids=np.array([[5, 6, 7, 8, 9, 0]], dtype=np.int32),
        labels=np.array([[-100, 6, 7, 8, 9, -100]], dtype=np.int32),
        position_ids=np.array([[0, 1, 2, 0, 1, 0]], dtype=np.int32),
        segment_ids=np.array([[1, 1, 1, 2, 2, 0]], dtype=np.int32),
        order=np.array([0], dtype=np.int32),
        max_steps=1,
        global_batch_size=1,
    )
    assert rows.batch(rows.rows_of(0)).targets.tolist() == [[6, 7, IGNORED, 9, IGNORED, IGNORED]]
    assert rows.counts(0) == (3, 5, 3 * 3 + 2 * 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_documents_do_not_see_each_other(
    make_backend: Callable[..., TorchBackend], tmp_path: Path, precision: str
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=1, global_batch_size=4, packed=True), 4)
    backend = make_backend(keep_masks=True, precision=precision)
    training.check_packing(backend, make_plan(precision=precision), rows, rows.first_packed_row() or 0)


def test_a_model_that_mixes_packed_documents_is_refused(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=1, global_batch_size=4, packed=True), 4)
    with pytest.raises(UserError, match=r"PackingContaminates.*set dataset.packing: none"):
        training.check_packing(make_backend(keep_masks=False), make_plan(), rows, 0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("linear", "get_linear_schedule_with_warmup"), ("cosine", "get_cosine_schedule_with_warmup")],
)
@pytest.mark.parametrize("warmup", [0, 3], ids=["no warm-up", "warm-up"])
def test_schedules_are_those_of_transformers(name: str, schedule: str, warmup: int) -> None:
    plan = make_plan(schedule=name, warmup_steps=warmup, total_steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    scheduler = getattr(transformers, schedule)(optimizer, warmup, 10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(plan, step) for step in range(10)] == pytest.approx(expected)


def run(backend: TorchBackend, plan: TrainingPlan, rows: PreparedRows, work: Path) -> training.Outcome:
    progress = Progress(ProgressPoster({}), plan.total_steps)
    return training.train(backend, plan, rows, work, None, progress, should_stop=lambda: False)


def test_training_lowers_the_loss_and_leaves_log_and_checkpoint(
    make_backend: Callable[..., TorchBackend], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    same = replace(rows, order=np.tile(rows.order[:8], 4))
    outcome = run(make_backend(), make_plan(learning_rate=0.05), same, tmp_path / "work")
    assert outcome.loss < outcome.first_loss
    assert outcome.checkpoint.name == "step-00000004"
    assert (outcome.timings.steps, outcome.timings.checkpoints) == (4, 2)
    assert "step 4/4  loss " in capsys.readouterr().out
    assert len((tmp_path / "work/training.jsonl").read_text().splitlines()) == 4


class Posted(ProgressPoster):
    """A poster that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__({})
        self.facts: list[tuple[int, str | None, int | None]] = []

    def post(self, facts: Mapping[str, Any]) -> None:
        self.facts.append((facts["step"], facts.get("phase"), facts.get("lastCheckpoint")))


def test_the_operator_is_told_of_every_step_whatever_is_logged(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    plan = make_plan(log_every_steps=3, checkpoint_every_steps=2)
    posted = Posted()
    progress = Progress(posted, plan.total_steps)
    training.train(make_backend(), plan, rows, tmp_path / "work", None, progress, should_stop=lambda: False)
    assert posted.facts == [
        (0, None, None),
        (1, None, None),
        (2, None, None),
        (2, "saving", None),
        (2, None, 2),
        (3, None, 2),
        (4, None, 2),
        (4, "saving", 2),
        (4, None, 4),
    ]


class Overtaken(TorchBackend):
    """A rank that hears of a checkpoint which an earlier attempt, not yet dead, then removes."""

    root: Path

    def broadcast(self, value: Any) -> Any:
        for path in self.root.glob("step-*"):
            shutil.rmtree(path)
        return value


def test_a_checkpoint_that_goes_away_while_it_is_resumed_is_worth_another_try(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    run(make_backend(), make_plan(), rows, tmp_path / "work")
    backend = Overtaken("cpu")
    backend.root = tmp_path / "work" / training.CHECKPOINTS_FOLDER
    with pytest.raises(RetryableError, match="CheckpointChanged: .*step-00000004 changed while training started"):
        training.resume(backend, make_plan(), backend.root)


def test_a_loss_that_is_no_number_stops_with_step_and_remedy(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    backend = make_backend()
    next(iter(backend._named.values())).data.fill_(math.inf)
    with pytest.raises(UserError, match=r"LossNotFinite: step 1 of 4: loss nan.*lower training.learningRate"):
        run(backend, make_plan(), rows, tmp_path / "work")
    assert not list((tmp_path / "work").glob("checkpoints/*"))


def test_a_batch_without_supervised_tokens_stops_with_its_step(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    silent = replace(rows, labels=np.full_like(rows.labels, IGNORED))
    with pytest.raises(UserError, match="NothingSupervised: no token of the global batch of step 1"):
        run(make_backend(), make_plan(), silent, tmp_path / "work")


def test_clipping_scales_the_gradient_to_its_bound_and_reports_the_norm_before(
    make_backend: Callable[..., TorchBackend], tmp_path: Path
) -> None:
    backend = make_backend()
    backend._flat[:-8] = 2.0
    expected = 2.0 * math.sqrt(backend._flat.numel() - 8)
    assert backend.update(0.0, 1.0) == pytest.approx(expected, rel=1e-5)
    assert float(backend._flat.abs().max()) == 0.0


def test_weight_decay_is_for_matrices_only(make_backend: Callable[..., TorchBackend]) -> None:
    backend = make_backend()
    assert all(facts.decays == (len(facts.shape) > 1) for facts in backend.parameters().values())
    assert not TorchBackend._decays("model.norm.weight", torch.zeros(4))
    assert not TorchBackend._decays("q_proj.bias", torch.zeros(4))


def test_rows_that_do_not_fit_the_batch_are_refused_with_the_numbers(tmp_path: Path) -> None:
    path = write_prepared(tmp_path / "p", steps=3, global_batch_size=4)
    with pytest.raises(UserError, match=r"prepare ordered 12 rows for 3 steps, and globalBatchSize 8 needs 24"):
        open_rows(path, 8)


def test_an_order_that_names_rows_that_are_not_there_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = write_prepared(tmp_path / "p", steps=3, global_batch_size=4)
    save_file({"order": np.full(12, 99, dtype=np.int32)}, path / "order.safetensors")
    with pytest.raises(CorruptArtifact, match="names rows 99 to 99, there are 8"):
        open_rows(path, 4)


def test_rows_are_cut_after_their_last_token() -> None:
    arrays = make_rows(4, packed=False)
    rows = PreparedRows(**arrays, order=np.arange(4, dtype=np.int32), max_steps=1, global_batch_size=4)
    longest = int((arrays["segment_ids"] != 0).sum(axis=1).max())
    assert rows.batch(rows.rows_of(0)).input_ids.shape == (4, min(24, -(-longest // 8) * 8))


def test_the_config_of_the_run_is_what_the_stage_passes(workspace: Path, tiny_model: Path) -> None:
    config = train_config(workspace, tiny_model)
    assert open_rows(config.input_path(contract.PREPARE), 8).max_steps == 8
