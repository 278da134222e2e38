"""Loads a base or merged model with transformers, the same way for training and for evaluation.

What transformers only warns of is refused here: weights that are missing, which it would make up at random; and a base
whose weights are quantized already, which could not be merged. A frozen base may be quantized while it is read, layer
by layer, by bitsandbytes: the files stay as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.errors import UserError
from finetune_trainer.model_files import check_unquantized
from finetune_trainer.safetensors_stream import some_names


@dataclass(frozen=True)
class Quantization:
    """How linear layers of a frozen base are held: `kind` is int8 or nf4, `dtype` what is computed with (torch's).

    The output layer, embeddings and the modules named in `kept` (full names) stay in `dtype`. Quantized weights are
    made on `device` and stay there.
    """

    kind: str
    dtype: Any
    kept: tuple[str, ...]
    device: Any


def load_causal_model(
    folder: Path, *, dtype: Any, trust_remote_code: bool = False, quantization: Quantization | None = None
) -> Any:
    """The causal language model in `folder`, in `dtype` (torch's, or "auto" for its own). No network.

    It is on the CPU, or with `quantization` on its device. UserError when transformers cannot load it, when the files
    lack weights that its architecture has, when they are quantized already, or when bitsandbytes is needed and
    missing. An OSError of the volume itself passes as it is.
    """
    from transformers import AutoModelForCausalLM

    check_unquantized(folder)
    options: dict[str, Any] = {}
    if quantization is not None:
        kept = [*_output_layer(folder, trust_remote_code), *quantization.kept]
        options = {"quantization_config": _bitsandbytes(quantization, kept), "device_map": {"": quantization.device}}
    # No attn_implementation: sdpa is taken where an architecture has it; asked for, others would be refused.
    model, found = _loaded(
        folder,
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if found["missing_keys"]:
        raise UserError(
            "ModelNotLoadable",
            f"{folder.name} lacks weights of {type(model).__name__}: {some_names(found['missing_keys'])}; they would "
            "be random numbers: choose a causal language model whose files are whole",
        )
    if quantization is not None:
        _prepare_quantized(model)
    return model


def load_skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model in `folder` without its weights (meta tensors): names, shapes, ties. UserError as load_causal_model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_unquantized(folder)
    config = _loaded(
        folder, AutoConfig.from_pretrained, folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    with torch.device("meta"):
        return _loaded(folder, AutoModelForCausalLM.from_config, config, trust_remote_code=trust_remote_code)


def _loaded(folder: Path, load: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the volume's, not the model's
        raise UserError(
            "ModelNotLoadable", f"transformers cannot load {folder.name} as a causal language model: {error}"
        ) from error


def _output_layer(folder: Path, trust_remote_code: bool) -> list[str]:
    """Its full name, in a list; nothing where the model has none."""
    skeleton = load_skeleton(folder, trust_remote_code=trust_remote_code)
    output = skeleton.get_output_embeddings()
    return [name for name, module in skeleton.named_modules() if output is not None and module is output]


def _bitsandbytes(quantization: Quantization, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "MissingLibrary",
            f"method.quantization is {quantization.kind}, and this image has no bitsandbytes: use the trainer image of "
            "this release, which has it, or quantization none",
        )
    if quantization.kind == "int8":
        # It would say at each layer of each pass that LLM.int8 rounds activations from float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # A second quantization, of the scales, would save 0.37 bits a weight and round once more.
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=quantization.dtype,
        llm_int8_skip_modules=kept,
    )


def _prepare_quantized(model: Any) -> None:
    """One device, one number format: nothing for accelerate's hooks to do, and no other layout for evaluation."""
    from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation bitsandbytes would repack the weights for such processors into a form without gradients,
            # and leave them so.
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_keep_scales)


def _keep_scales(layer: Any, _inputs: Any) -> None:
    """peft's DoRA moves an int8 weight to the CPU, where it is already, and so makes a new one without its scales.

    bitsandbytes would take their absence over into the layer's state, which has them since the first pass.
    """
    if layer.weight.SCB is None and layer.state.SCB is not None:
        layer.weight.CB = None
