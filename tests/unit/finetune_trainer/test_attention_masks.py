"""Documents of a packed row do not see each other, in each kind of attention that models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.attention_masks import DocumentMasks

FIRST, SECOND = list(range(10, 19)), list(range(40, 53))


@pytest.fixture(scope="module")
def tiny_bloom(tiny_model_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny_model_module.write_tiny_bloom(tmp_path_factory.mktemp("bloom"))
    return folder


@pytest.fixture
def load(tiny_model: Path, tiny_bloom: Path) -> Any:
    def model(name: str, attention: str, dtype: torch.dtype) -> Any:
        folder = {"llama": tiny_model, "bloom": tiny_bloom}[name]
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.mul_(3)  # attention that matters: the tiny models' is almost even
        return loaded

    return model


def packed_logits(model: Any, first: list[int]) -> torch.Tensor:
    """(13, vocabulary): the second document's, behind `first` in a row with some padding."""
    row = [*first, *SECOND, 2, 2, 2]
    segments = torch.tensor([[1] * len(first) + [2] * len(SECOND) + [0] * 3])
    positions = torch.tensor([[*range(len(first)), *range(len(SECOND)), 0, 0, 0]])
    arguments: dict[str, Any] = {"attention_mask": DocumentMasks(model)(segments), "use_cache": False}
    if model.config.model_type != "bloom":
        arguments["position_ids"] = positions
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([row]), **arguments).logits
    return logits[0, len(first) : len(first) + len(SECOND)].float()


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [
        pytest.param("llama", "sdpa", torch.float32, id="truth values"),
        pytest.param("llama", "eager", torch.float32, id="added to the scores"),
        pytest.param("llama", "eager", torch.bfloat16, id="added in bfloat16"),
        pytest.param("bloom", "eager", torch.float32, id="alibi"),
        pytest.param("bloom", "eager", torch.bfloat16, id="alibi in bfloat16"),
    ],
)
def test_a_document_has_the_same_logits_packed_and_alone(
    load: Any, name: str, attention: str, dtype: torch.dtype
) -> None:
    model = load(name, attention, dtype)
    with torch.no_grad():
        alone = model(torch.tensor([SECOND]), use_cache=False).logits[0].float()
    close = {"rtol": 0, "atol": (1e-5 if dtype == torch.float32 else 4e-2) * float(alone.abs().max())}
    torch.testing.assert_close(packed_logits(model, FIRST), alone, **close)
    torch.testing.assert_close(packed_logits(model, FIRST[::-1]), packed_logits(model, FIRST), rtol=0, atol=0)


def test_a_whole_row_of_bloom_is_what_it_was(load: Any) -> None:
    row = torch.tensor([FIRST + SECOND])
    model = load("bloom", "eager", torch.float32)
    with torch.no_grad():
        before = model(row, use_cache=False).logits
        DocumentMasks(model)
        DocumentMasks(model)
        torch.testing.assert_close(model(row, use_cache=False).logits, before, rtol=0, atol=0)


def test_without_the_mask_the_logits_differ(load: Any) -> None:
    model = load("llama", "sdpa", torch.float32)
    with torch.no_grad():
        alone = model(torch.tensor([SECOND]), use_cache=False).logits[0]
        mixed = model(torch.tensor([FIRST + SECOND]), use_cache=False).logits[0, len(FIRST) :]
    assert float((mixed - alone).abs().max()) > 0.01 * float(alone.abs().max())
