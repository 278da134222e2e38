"""Which positions of a packed row may attend to which: the one rule that training and evaluation share.

A DocumentMasks is made once a model, and gives the mask of each batch in the form that this model's attention takes.
"""

from __future__ import annotations

from typing import Any

import torch


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """(b, 1, s, s), true where a position may look: back, inside its own document.

    `segments` is (b, s), the document's number at each position. Padding is a document of its own (0), so that no
    position is left without anything to look at, which would give NaN.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()


class DocumentMasks:
    """The attention_mask argument of one model for rows of several documents.

    Attention that transformers writes out ("eager") adds the mask to its scores, the others take truth values. BLOOM
    has no positions but alibi, which it counts from a mask of two dimensions: it is taught to count them from ours, so
    that a document's are the same wherever it stands in its row. The model itself is changed by that.
    """

    def __init__(self, model: Any) -> None:
        self._adds = getattr(model.config, "_attn_implementation", None) == "eager"
        for module in model.modules():
            if hasattr(module, "build_alibi_tensor") and not hasattr(module, "alibi_of_whole_rows"):
                module.alibi_of_whole_rows = module.build_alibi_tensor
                module.build_alibi_tensor = _DocumentAlibi(module.alibi_of_whole_rows)

    def __call__(self, segments: torch.Tensor) -> torch.Tensor:
        """(b, 1, s, s) for `segments` of (b, s)."""
        mask = document_mask(segments)
        if not self._adds:
            return mask
        # the least of bfloat16 is more than the least of float32: it stays finite in every dtype that scores have
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)


class _DocumentAlibi:
    """BLOOM's build_alibi_tensor for both kinds of masks."""

    def __init__(self, of_whole_rows: Any) -> None:
        self._of_whole_rows = of_whole_rows

    def __call__(self, mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """(b * heads, 1, s): each head's slope times the position inside the document."""
        if mask.dim() == 2:
            whole: torch.Tensor = self._of_whole_rows(mask, num_heads, dtype)
            return whole
        positions = (mask[:, 0] == 0).sum(dim=-1) - 1  # (b, s), how far back a position sees
        slopes = self._of_whole_rows(torch.ones(1, 2, device=mask.device), num_heads, torch.float32)[:, 0, 1]
        alibi: torch.Tensor = slopes[None, :, None] * positions[:, None, :]
        return alibi.reshape(-1, 1, positions.shape[-1]).to(dtype)
