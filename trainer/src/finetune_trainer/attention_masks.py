"""Which positions of a packed row may attend to which: the one rule that training and evaluation share."""

from __future__ import annotations

import torch


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """(b, 1, s, s), true where a position may look: back, inside its own document.

    `segments` is (b, s), the document's number at each position. Padding is a document of its own (0), so that no
    position is left without anything to look at, which would give NaN.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
