"""Loads a base or merged model with transformers, the same way for training and for evaluation.

What transformers only warns of is refused here: weights that are missing, which it would make up at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_trainer.errors import UserError
from finetune_trainer.safetensors_stream import some_names


def load_causal_model(folder: Path, *, dtype: Any, trust_remote_code: bool = False) -> Any:
    """The causal language model in `folder`, in `dtype` (torch's, or "auto" for its own), on the CPU. No network.

    UserError when transformers cannot load it, or when the files lack weights that its architecture has. An OSError of
    the volume itself passes as it is.
    """
    from transformers import AutoModelForCausalLM

    try:
        # No attn_implementation: sdpa is taken where an architecture has it; asked for, others would be refused.
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the volume's, not the model's
        raise UserError(
            "ModelNotLoadable", f"transformers cannot load {folder.name} as a causal language model: {error}"
        ) from error
    if found["missing_keys"]:
        raise UserError(
            "ModelNotLoadable",
            f"{folder.name} lacks weights of {type(model).__name__}: {some_names(found['missing_keys'])}; they would "
            "be random numbers: choose a causal language model whose files are whole",
        )
    return model
