"""Every argument of the vendor's that backends/neuron.py sets, in one place, and whether the installed version has it.

optimum-neuron, neuronx-distributed and torch_xla change names between releases, and some of their functions take what
they do not know in **kwargs and forget it. VENDOR_ARGUMENTS lists what is set; check_vendor() holds it against what is
installed, at the start of a run and in the tests that a new pin must pass. The functions below say to what values.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from finetune_trainer.backends import ADAM_BETAS, ADAM_EPSILON
from finetune_trainer.errors import UserError
from finetune_trainer.spec_rules import FLASH_TOKENS

ADAPTER = "default"
"""The vendor's name of the only adapter, part of its folder (adapter_default) and of names in memory."""

EAGER, FLASH = "eager", "flash_attention_2"

VENDOR_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "optimum.neuron.models.training.config:TrainingNeuronConfig": (
        "tensor_parallel_size",
        "sequence_parallel_enabled",
        "pipeline_parallel_size",
        "pipeline_parallel_num_microbatches",
        "pipeline_parallel_use_zero1_optimizer",
        "gradient_checkpointing",
        "use_xser",
        "async_save",
        "fuse_qkv",
        "recompute_causal_mask",
    ),
    "optimum.neuron.models.training.modeling_utils:NeuronModelMixin.from_pretrained": (
        "pretrained_model_name_or_path",
        "trn_config",
        "local_files_only",
        "use_safetensors",
    ),
    "optimum.neuron.models.training.loss_utils:ForCausalLMLoss": ("logits", "labels", "vocab_size", "reduction"),
    "optimum.neuron.models.training.pipeline_utils:create_nxdpp_model": ("model",),
    "optimum.neuron.models.training.transformations_utils:create_parameter_metadata": ("model",),
    "optimum.neuron.models.training.transformations_utils:to_original_peft_config_for_model": (
        "model",
        "peft_config",
        "inplace",
    ),
    (
        "optimum.neuron.models.training.transformations_utils:"
        "GQAQKVColumnParallelLinearSpec.compute_query_indices_for_rank"
    ): ("tp_size", "tp_rank", "num_attention_heads", "num_key_value_heads", "kv_size_multiplier"),
    "optimum.neuron.peft.mapping_func:get_peft_model": (
        "model",
        "peft_config",
        "adapter_name",
        "autocast_adapter_dtype",
    ),
    "neuronx_distributed.trainer.trainer:neuronx_distributed_config": (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "sequence_parallel",
        "optimizer_config",
        "mixed_precision_config",
    ),
    "neuronx_distributed.trainer.trainer:initialize_parallel_optimizer": (
        "nxd_config",
        "optimizer_class",
        "parameters",
    ),
    "torch_xla.distributed.zero_redundancy_optimizer:ZeroRedundancyOptimizer.__init__": (
        "params",
        "optimizer_class",
        "max_norm",
        "grad_clipping",
        "save_master_weights",
        "use_grad_acc_hook",
    ),
    "neuronx_distributed.optimizer.zero_redundancy_optimizer:NeuronZero1Optimizer._get_params_and_grad_norm": (
        "norm_type",
    ),
    "neuronx_distributed.parallel_layers.layers:_linear_autograd_bwd_grad_reduce": (
        "ctx",
        "grad_input",
        "original_dtype",
    ),
    "neuronx_distributed.parallel_layers.grads:get_grad_norm": (
        "parameters",
        "norm_type",
        "zero1_optimizer",
        "zero1_optimizer_groups",
    ),
    "neuronx_distributed.trainer.checkpoint:save_checkpoint": (
        "checkpoint_dir_str",
        "tag",
        "model",
        "optimizer",
        "user_content",
        "use_xser",
        "num_workers",
        "async_save",
    ),
    "neuronx_distributed.trainer.checkpoint:load_checkpoint": ("path", "tag", "model", "optimizer"),
    "neuronx_distributed.trainer.checkpoint:finalize_checkpoint": (),
    "neuronx_distributed.pipeline.model:NxDPPModel.run_train": ("kwargs",),
    "neuronx_distributed.pipeline.model:NxDPPModel.run_eval": ("kwargs",),
}
"""What is called, as module:name, and the arguments by name that are passed to it."""

_PACKAGES = {
    "optimum": "optimum-neuron",
    "neuronx_distributed": "neuronx-distributed",
    "torch_xla": "torch-xla",
}


def check_vendor() -> None:
    """UserError names the first of VENDOR_ARGUMENTS that the installed packages lack, and their version."""
    for target, arguments in VENDOR_ARGUMENTS.items():
        module, _, name = target.partition(":")
        package = _PACKAGES[module.partition(".")[0]]
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise _mismatch(package, f"has no {module}.{name} ({error})") from error
        known = argument_names(found)
        missing = [argument for argument in arguments if argument not in known]
        if missing:
            raise _mismatch(package, f"has no argument {', '.join(missing)} of {module}.{name}")


def argument_names(target: Any) -> frozenset[str]:
    """The fields of a dataclass, or the parameters of a function; those that only **kwargs would take are not among
    them."""
    if is_dataclass(target):
        return frozenset(field.name for field in fields(target))
    return frozenset(inspect.signature(target).parameters)


def _mismatch(package: str, what: str) -> UserError:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "that is not installed"
    return UserError(
        "NeuronStackMismatch",
        f"{package} {version} {what}: use the Trainium image of this release (stages.compile.image and "
        "stages.train.image must be left out, or name an image built from it)",
    )


def attention_of(row_length: int, *, keeps_documents_apart: bool) -> str:
    """The vendor's attention: its flash kernel takes rows of a multiple of FLASH_TOKENS, and no mask but the causal.

    A mask that keeps documents apart is (s, s) numbers a row, so it is used only where rows are that short.
    """
    return FLASH if row_length % FLASH_TOKENS == 0 and not keeps_documents_apart else EAGER


def training_arguments(
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    micro_steps: int,
    gradient_checkpointing: bool,
    keeps_documents_apart: bool,
) -> dict[str, Any]:
    """TrainingNeuronConfig's fields. A pipeline takes all micro steps of an optimizer step at once."""
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "pipeline_parallel_num_microbatches": micro_steps if pipeline_parallel_size > 1 else 1,
        # Or else the pipeline engine averages gradients over data parallel ranks and ZeRO-1 does it again: the same
        # value for twice the traffic.
        "pipeline_parallel_use_zero1_optimizer": pipeline_parallel_size > 1,
        "gradient_checkpointing": gradient_checkpointing,
        # One file a tensor: written and read by all ranks at once, and read without torch_xla.
        "use_xser": True,
        # A choice of the first save for the whole process, and its `done` appears only in a later call: a pod that is
        # killed between leaves nothing. What is waited for is written where it can be waited for.
        "async_save": False,
        # An adapter on the fused layer fails in its forward pass (an in-place sum on a view).
        "fuse_qkv": False,
        "sequence_parallel_enabled": False,
        # True ignores every mask and is what flash attention does anyway.
        "recompute_causal_mask": not keeps_documents_apart,
    }


def distributed_arguments(*, tensor_parallel_size: int, pipeline_parallel_size: int) -> dict[str, Any]:
    """neuronx_distributed_config's arguments; every sub-key, since those that are missing get defaults of its own."""
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "sequence_parallel": False,
        # grad_clipping stays on where nothing is clipped: without it no norm is computed. The bound itself goes to
        # optimizer_arguments, for this one does not reach ZeRO-1, which would clip at 1.0.
        "optimizer_config": {"zero_one_enabled": True, "grad_clipping": True, "max_grad_norm": 1.0},
        # Masters must be in the checkpoint: rebuilt from bf16 they are other numbers, and rebuilt in the vendor's order
        # of loading they are the weights before training.
        "mixed_precision_config": {
            "use_master_weights": True,
            "use_fp32_grad_acc": True,
            "use_master_weights_in_ckpt": True,
        },
    }


def optimizer_arguments(max_gradient_norm: float) -> dict[str, Any]:
    """initialize_parallel_optimizer's further arguments: AdamW's, and ZeRO-1's own bound of the norm (0 is none)."""
    return {
        "lr": 0.0,
        "betas": ADAM_BETAS,
        "eps": ADAM_EPSILON,
        "max_norm": max_gradient_norm if max_gradient_norm > 0 else float("inf"),
    }
