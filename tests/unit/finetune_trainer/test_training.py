"""The loop and the torch backend in one process: gradients, schedules, rows, packing, health of the loss."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gradients import assert_same_gradient, gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train_runs import METHOD, ROW_LENGTH, make_rows, train_config, write_prepared

from finetune_trainer import contract, training
from finetune_trainer.backends import IGNORED, MicroBatch, ModelPlan
from finetune_trainer.backends.torch import TorchBackend
from finetune_trainer.batches import PreparedRows, held_out_batches, open_rows
from finetune_trainer.errors import CorruptArtifact, RetryableError, UserError
from finetune_trainer.evaluation import measure_loss
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
def make_backend(tiny_model: Path) -> Iterator[Callable[..., TorchBackend]]:
    backends = []

    def make(
        *,
        keep_masks: bool = False,
        method: dict[str, Any] = NO_DROPOUT,
        precision: str = "fp32",
        strategy: str = "ddp",
        gradient_checkpointing: bool = False,
    ) -> TorchBackend:
        backend = TorchBackend("cpu", strategy)
        backend.start()
        backends.append(backend)
        backend.build(
            ModelPlan(
                folder=tiny_model,
                method=method,
                precision=precision,
                weight_decay=0.1,
                seed=3,
                keep_masks=keep_masks,
                gradient_checkpointing=gradient_checkpointing,
            )
        )
        return backend

    yield make
    for backend in backends:
        backend.stop()


@pytest.fixture(params=[False, True], ids=["one document a row", "packed rows"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> PreparedRows:
    path = write_prepared(tmp_path / "prepared", steps=4, global_batch_size=GLOBAL_BATCH, packed=request.param)
    return open_rows(path, GLOBAL_BATCH)


def is_packed(rows: PreparedRows) -> bool:
    return rows.first_packed_row() is not None


FULL = {"type": "full", "quantization": "none"}


@pytest.mark.parametrize(
    ("strategy", "method"),
    [("ddp", FULL), ("fsdp", NO_DROPOUT), ("fsdp", FULL)],
    ids=["copies", "shares", "all shares"],
)
def test_the_gradient_is_the_same_however_the_global_batch_is_split(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows, strategy: str, method: dict[str, Any]
) -> None:
    whole, loss = gradient(make_backend(keep_masks=is_packed(rows), method=method), rows, GLOBAL_BATCH, 1)
    assert float(whole.abs().max()) > 1e-4
    backend = make_backend(keep_masks=is_packed(rows), method=method, strategy=strategy)
    for micro_batch_size, dp_size in ((1, 1), (2, 2), (1, 8)):
        split, split_loss = gradient(backend, rows, micro_batch_size, dp_size)
        assert_same_gradient(split, whole)
        assert split_loss == pytest.approx(loss, rel=1e-6)


SUPERVISED = st.lists(st.integers(0, ROW_LENGTH - 2), min_size=GLOBAL_BATCH, max_size=GLOBAL_BATCH)


@given(supervised=SUPERVISED.filter(any), split=st.sampled_from([(1, 1), (1, 2), (2, 4), (4, 1), (1, 8), (8, 1)]))
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_numbers_of_supervised_tokens_and_any_split_give_the_gradient_of_the_whole_batch(
    shared_backend: TorchBackend, supervised: list[int], split: tuple[int, int]
) -> None:
    arrays = make_rows(GLOBAL_BATCH, packed=False)
    arrays["segment_ids"][:], arrays["labels"][:] = 1, -100
    for row, count in enumerate(supervised):
        arrays["labels"][row, ROW_LENGTH - count :] = arrays["input_ids"][row, ROW_LENGTH - count :]
    order = np.arange(GLOBAL_BATCH, dtype=np.int32)
    rows = PreparedRows(**arrays, order=order, max_steps=1, global_batch_size=GLOBAL_BATCH)
    assert rows.counts(0).supervised == sum(supervised)
    whole, loss = gradient(shared_backend, rows, GLOBAL_BATCH, 1)
    found, split_loss = gradient(shared_backend, rows, *split)
    assert_same_gradient(found, whole)
    assert split_loss == pytest.approx(loss, rel=1e-6)


@pytest.fixture(params=["ddp", "fsdp"])
def shared_backend(request: pytest.FixtureRequest, make_backend: Callable[..., TorchBackend]) -> TorchBackend:
    return make_backend(strategy=request.param)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradient_checkpointing_changes_no_bit_with_dropout(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows, strategy: str
) -> None:
    method = {**METHOD, "lora": {**METHOD["lora"], "dropout": 0.3}}  # type: ignore[dict-item]
    plain = make_backend(keep_masks=is_packed(rows), method=method, strategy=strategy)
    saving = make_backend(keep_masks=is_packed(rows), method=method, strategy=strategy, gradient_checkpointing=True)
    assert plain._model.is_gradient_checkpointing is False
    assert saving._model.is_gradient_checkpointing is True
    expected, loss = gradient(plain, rows, 2, 2)
    found, found_loss = gradient(saving, rows, 2, 2)
    assert torch.equal(found, expected)
    assert found_loss == loss


def test_weights_that_travel_in_bf16_train_as_float32(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows
) -> None:
    backends = [
        make_backend(keep_masks=is_packed(rows), precision="bf16", method=FULL, strategy=strategy)
        for strategy in ("ddp", "fsdp")
    ]
    (whole, loss), (shares, shares_loss) = (gradient(backend, rows, 2, 1) for backend in backends)
    assert {facts.dtype for facts in backends[1].parameters().values()} == {"F32"}
    assert shares.dtype == torch.float32
    assert float((shares - whole).norm() / whole.norm()) < 0.02
    assert shares_loss == pytest.approx(loss, rel=0.01)


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


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_only_supervised_positions_pass_the_output_layer(
    tiny_model: Path, tiny_model_module: ModuleType, tmp_path: Path, architecture: str
) -> None:
    folder = tiny_model if architecture == "llama" else tiny_model_module.write_tiny_bloom(tmp_path / "bloom")
    rows = open_rows(write_prepared(tmp_path / "p", steps=1, global_batch_size=4), 4)
    backend = TorchBackend("cpu")
    backend.build(ModelPlan(folder=folder, method=FULL, precision="fp32", weight_decay=0.0, seed=3, keep_masks=False))
    layer, seen = backend._model.get_output_embeddings(), []
    layer.register_forward_hook(lambda _layer, inputs, logits: seen.append((inputs[0].shape, logits.shape)))
    supervised = rows.counts(0).supervised
    backend.micro_step(rows.batch(rows.rows_of(0)), 1.0 / supervised, 0, last=True)
    vocabulary, hidden = layer.weight.shape
    assert seen == [((supervised, hidden), (supervised, vocabulary))]
    numbers = rows.rows_of(0)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(
            input_ids=torch.from_numpy(rows.input_ids[numbers]).long(),
            attention_mask=torch.from_numpy((rows.segment_ids[numbers] != 0).astype(np.int64)),
            labels=torch.from_numpy(rows.labels[numbers]).long(),
        ).loss
    assert backend.reduce([0.0])[0] == pytest.approx(float(expected), abs=1e-5)


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_held_out_loss_is_that_of_evaluation_and_training_does_not_notice_it(
    make_backend: Callable[..., TorchBackend], tmp_path: Path, strategy: str
) -> None:
    rows = open_rows(write_prepared(tmp_path / "p", steps=4, global_batch_size=8), 8)
    arrays = make_rows(5, packed=False, seed=9)  # no multiple of the micro batch
    held_out = PreparedRows(order=np.zeros(0, dtype=np.int32), max_steps=0, global_batch_size=0, **arrays)
    ends = []
    for every in (None, 3):
        backend = make_backend(strategy=strategy, method=METHOD)
        plan = make_plan(evaluate_every_steps=every)
        progress = Progress(ProgressPoster({}), plan.total_steps)
        work = tmp_path / f"work-{every}"
        training.train(backend, plan, rows, work, None, progress, should_stop=lambda: False, held_out=held_out)
        ends.append([bytes(part.data()) for part in backend.slices() if part.kind == "param"])
    assert ends[0] == ends[1]
    lines = [json.loads(line) for line in (tmp_path / "work-3" / "training.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validationLoss" in line]
    assert [line["step"] for line in found] == [3, 4]
    if strategy == "ddp":
        expected = measure_loss(backend._model.eval(), held_out)
        assert expected is not None
        assert found[-1]["validationLoss"] == pytest.approx(expected.loss, abs=1e-5)
        assert found[-1]["validationTokens"] == expected.tokens


@settings(deadline=None)
@given(rows=st.integers(1, 12), micro=st.integers(1, 4), ranks=st.integers(1, 4))
def test_ranks_share_held_out_rows_evenly_and_each_target_counts_once(rows: int, micro: int, ranks: int) -> None:
    arrays = make_rows(rows, packed=False, seed=rows)
    held_out = PreparedRows(order=np.zeros(0, dtype=np.int32), max_steps=0, global_batch_size=0, **arrays)
    shares = [list(held_out_batches(held_out, micro, rank, ranks, whole=True)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert {batch.input_ids.shape for batch in batches} == {(micro, ROW_LENGTH)}
    assert sum(int((batch.targets != IGNORED).sum()) for batch in batches) == held_out.supervised_in_all()


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
    steps = [step for step, _, _ in posted.facts]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3, 4}
    assert [step for step, phase, _ in posted.facts if phase == "saving"] == [2, 4]
    # Of the first checkpoint it is told when it is written, which training does not wait for.
    assert list(dict.fromkeys(last for _, _, last in posted.facts)) == [None, 2, 4]
    assert posted.facts[-1] == (4, None, 4)


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_clipping_scales_the_gradient_to_its_bound_and_reports_the_norm_before(
    make_backend: Callable[..., TorchBackend], rows: PreparedRows, strategy: str
) -> None:
    """The first moment after one step is a tenth of the gradient that the optimizer saw."""
    backend = make_backend(keep_masks=is_packed(rows), strategy=strategy)
    whole, _ = gradient(backend, rows, 2, 1)
    bound = float(whole.norm()) / 4
    supervised = rows.counts(0).supervised
    for chunk, batch in rows.micro_batches(0, 2, 0, 1):
        backend.micro_step(batch, 1.0 / supervised, chunk_seed(3, 0, chunk), last=chunk == 3)
    backend.reduce([])
    assert backend.update(0.0, bound) == pytest.approx(float(whole.norm()), rel=1e-5)
    moments = [bytes(part.data()) for part in backend.slices() if part.kind == "exp_avg"]
    seen = 10 * np.frombuffer(b"".join(moments), dtype=np.float32)
    assert float(np.linalg.norm(seen)) == pytest.approx(bound, rel=1e-5)
    assert backend.reduce([])[0] == 0.0
    assert backend.update(0.0, bound) == 0.0


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
