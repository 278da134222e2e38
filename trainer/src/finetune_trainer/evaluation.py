"""Measures a causal language model: loss on held-out rows, and answers to prompts.

stages/evaluate.py calls this for the base and for the tuned model, one after the other. Rows and prompts are prepare's
own: the same tokens, the same masks as in training, the same prompt strings. Nothing is trained or written here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from finetune_trainer.attention_masks import DocumentMasks
from finetune_trainer.backends import IGNORED, MicroBatch
from finetune_trainer.batches import PreparedRows
from finetune_trainer.errors import UserError
from finetune_trainer.model_loading import load_causal_model
from finetune_trainer.tokenization import Encoder

_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Positions of one forward pass. Logits take 4 bytes times the vocabulary for each supervised one."""
_SAMPLED_POSITIONS = 64
"""Positions at which two models are compared: enough to see a wrong merge, and little memory for any vocabulary."""
_MAX_EXPONENT = 700.0
"""exp() of more does not fit a float."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross entropy in nats over `tokens` supervised tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None where that is too large for a number."""
        return math.exp(self.loss) if self.loss < _MAX_EXPONENT else None


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt: the exact string, and its tokens with the tokenizer's own prefix."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Generation:
    """How answers are generated: greedily, or with `do_sample` drawn by temperature and top-p and nothing else.

    `max_new_tokens` is the longest answer. `seed` starts the random numbers of each prompt anew, so that both models
    draw by the same numbers, and an answer does not depend on the other prompts.
    """

    do_sample: bool
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


def pick_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def load_model(
    folder: Path, device: torch.device, *, adapter: Path | None = None, trust_remote_code: bool = False
) -> Any:
    """The model of `folder` in its own dtype, with the peft adapter in `adapter` on it.

    UserError when it cannot be loaded.
    """
    model = load_causal_model(folder, dtype="auto", trust_remote_code=trust_remote_code).to(device).eval()
    return model if adapter is None else add_adapter(model, adapter)


def add_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` on it, by peft; the model itself is changed."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).to(model.device).eval()


def sample_logits(model: Any, rows: PreparedRows, prompts: Sequence[EncodedPrompt]) -> torch.Tensor | None:
    """(p, vocabulary) in float32: logits at the first positions of the first held-out row, else of the first prompt.

    None where there is neither. Equal arguments give equal positions, so that two models can be compared.
    """
    if rows.input_ids.shape[0]:
        batch = rows.batch(np.zeros(1, dtype=np.int32))
    elif prompts:
        tokens = np.array([prompts[0].tokens], dtype=np.int32)
        ones = np.ones_like(tokens)
        batch = MicroBatch(tokens, ones * IGNORED, np.arange(tokens.size, dtype=np.int32)[None], ones)
    else:
        return None
    positions = batch.segment_ids[0].nonzero()[0][:_SAMPLED_POSITIONS]
    return logits_at(model, batch, positions)[0].float().cpu()


def compare_logits(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the share of positions whose greedy next token is the same."""
    agreement = (one.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()
    return float((one - other).abs().max()), float(agreement)


def measure_loss(model: Any, rows: PreparedRows) -> HeldOutLoss | None:
    """The loss over every supervised token of `rows`, each token counting alike; None where there is none.

    UserError when the loss is not finite.
    """
    total, tokens = 0.0, 0
    for batch in _batches(rows, model.device.type):
        positions = (batch.targets != IGNORED).any(axis=0).nonzero()[0]
        if not len(positions):
            continue
        logits = logits_at(model, batch, positions).float()
        targets = torch.from_numpy(batch.targets[:, positions]).long().to(logits.device)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        total += float(loss)
        tokens += int((batch.targets != IGNORED).sum())
    if not tokens:
        return None
    if not math.isfinite(total):
        raise UserError(
            "LossNotFinite", f"the held-out loss is {total}: the training diverged, lower training.learningRate"
        )
    return HeldOutLoss(total / tokens, tokens)


def answer_prompts(
    model: Any, prompts: Sequence[EncodedPrompt], encoder: Encoder, tokenizer: Any, generation: Generation
) -> list[str]:
    """The answer to each prompt without special tokens, up to an end of sequence or the most tokens."""
    from transformers import GenerationConfig

    # The model's own generation settings do not count: both models answer by the same. transformers' default top_k of
    # 50 would be a setting that nobody asked for.
    sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    settings = GenerationConfig(
        do_sample=generation.do_sample,
        **(sampling if generation.do_sample else {}),
        num_beams=1,
        max_new_tokens=generation.max_new_tokens,
        eos_token_id=sorted(_stop_tokens(model, encoder)),
        pad_token_id=encoder.pad_token_id,
    )
    answers = []
    for prompt in prompts:
        # One at a time: padding in front of a prompt changes what some models answer.
        tokens = torch.tensor([prompt.tokens], device=model.device)
        with _seeded(model.device, generation.seed), torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                use_model_defaults=False,
            )
        added = output[0, len(prompt.tokens) :].tolist()
        answers.append(tokenizer.decode(added, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return answers


def check_lengths(prompts: Sequence[EncodedPrompt], max_tokens: int, max_positions: int | None) -> None:
    """UserError names the first prompt that leaves no room for its answer in the model's positions."""
    for number, prompt in enumerate(prompts):
        if max_positions is not None and len(prompt.tokens) + max_tokens > max_positions:
            raise UserError(
                "PromptTooLong",
                f"evaluate.prompts[{number}] has {len(prompt.tokens)} tokens, which with maxNewTokens {max_tokens} is "
                f"more than the model's {max_positions} positions: shorten it or lower evaluate.maxNewTokens",
            )


def logits_at(model: Any, batch: MicroBatch, positions: Any) -> torch.Tensor:
    """(m, len(positions), vocabulary): the logits at these columns, with documents kept apart as in training."""
    segments = torch.from_numpy(batch.segment_ids).to(model.device)
    arguments: dict[str, Any] = {
        "input_ids": torch.from_numpy(batch.input_ids).long().to(model.device),
        "use_cache": False,
    }
    known = inspect.signature(_innermost(model).forward).parameters
    if "position_ids" in known:
        arguments["position_ids"] = torch.from_numpy(batch.position_ids).long().to(model.device)
    if batch.segment_ids.max(initial=0) > 1:
        arguments["attention_mask"] = DocumentMasks(_innermost(model))(segments)
    columns = torch.from_numpy(np.asarray(positions)).to(model.device)
    keeps = "logits_to_keep" in known
    if keeps:
        arguments["logits_to_keep"] = columns
    with torch.no_grad():
        logits: torch.Tensor = model(**arguments).logits
    return logits if keeps else logits[:, columns]


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; what was there before goes on afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _innermost(model: Any) -> Any:
    """The transformers model itself: peft's wrapper takes any argument and hands it on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _stop_tokens(model: Any, encoder: Encoder) -> set[int]:
    """What training taught as the end, and what the model's own generation settings call one."""
    own = getattr(model, "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return {*encoder.stop_token_ids, *listed}


def _batches(rows: PreparedRows, device: str) -> Iterator[MicroBatch]:
    count, length = rows.input_ids.shape
    step = max(1, _BATCH_TOKENS.get(device, _BATCH_TOKENS["cpu"]) // max(1, length))
    for start in range(0, count, step):
        yield rows.batch(np.arange(start, min(start + step, count), dtype=np.int32))
