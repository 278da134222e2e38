"""What a job trains of its base model, by spec.method: an adapter of peft's, whole modules beside it, or every weight.

backends/torch.py takes its model from load_trainable_model. Names, tied weights and the number of trainable parameters
are decided on the model without its weights (meta tensors), so a wrong method is told before a weight is read; after
loading, the count must be what arithmetic gave. What trains is float32, in both precisions: with bf16 the arithmetic is
autocast's, and these are its master weights. Nothing here trains.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers.pytorch_utils import Conv1D

from finetune_trainer.errors import UserError
from finetune_trainer.model_loading import Quantization, load_causal_model, load_skeleton
from finetune_trainer.safetensors_stream import some_names
from finetune_trainer.spec_checks import check_part
from finetune_trainer.spec_rules import ALL_LINEAR

_ADAPTER = "default"
"""peft's name of the only adapter. It is part of parameter names in memory and in no file."""
_MAGNITUDE = f".lora_magnitude_vector.{_ADAPTER}.weight"
_SAVED = f".modules_to_save.{_ADAPTER}."


@dataclass(frozen=True)
class Lora:
    """spec.method.lora. The adapter's output is scaled by alpha / rank, of rslora by alpha / sqrt(rank)."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    saved: tuple[str, ...]
    variant: str


@dataclass(frozen=True)
class Method:
    """spec.method; `lora` is None where every weight trains."""

    quantization: str
    lora: Lora | None


@dataclass(frozen=True)
class Trainables:
    """What a method trains of one model.

    `targets` and `saved` are full names of modules; `linear_is_transposed` says that the targets store their weights as
    (inputs, outputs), as GPT-2's do; `parameters` is the number that trains.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    linear_is_transposed: bool
    parameters: int


def parse_method(method: Mapping[str, Any]) -> Method:
    """spec.method; UserError InvalidSpec with everything that is wrong with it."""
    problems = check_part({"method": method})
    if problems:
        raise UserError("InvalidSpec", "; ".join(str(problem) for problem in problems))
    quantization = method.get("quantization", "none")
    if method.get("type", "lora") == "full":
        return Method(quantization, None)
    given = method["lora"]
    lora = Lora(
        rank=given["rank"],
        alpha=given.get("alpha", given["rank"]),
        dropout=float(given.get("dropout", 0.0)),
        targets=tuple(given["targetModules"]),
        saved=tuple(given.get("modulesToSave") or ()),
        variant=given.get("variant", "standard"),
    )
    return Method(quantization, lora)


def find_trainables(model: Any, method: Method) -> Trainables:
    """What `method` trains of `model`, which may be without weights (meta tensors); nothing is changed.

    Parameters: rank * (inputs + outputs) for each adapted layer (Hu et al. 2021), one more for each output with DoRA
    (Liu et al. 2024), and each parameter of saved modules; with full every parameter, tied ones once.

    UserError when a name fits no module, when two names overlap, when an adapted or saved weight is tied to another
    one, and when targets store their weights in both orders.
    """
    if method.lora is None:
        return Trainables((), (), linear_is_transposed=False, parameters=_numel(model))
    lora = method.lora
    saved = _find_saved(model, lora)
    targets = _find_targets(model, lora, saved)
    shapes = [_inputs_and_outputs(module) for module in targets.values()]
    total = sum(lora.rank * (inputs + outputs) for inputs, outputs in shapes)
    if lora.variant == "dora":
        total += sum(outputs for _, outputs in shapes)
    total += sum(_numel(module) for module in saved.values())
    transposed = {isinstance(module, Conv1D) for module in targets.values()}
    if len(transposed) > 1:
        plain = [name for name, module in targets.items() if not isinstance(module, Conv1D)]
        raise UserError(
            "UnsupportedTargets",
            f"method.lora.targetModules names {some_names(plain)}, which store their weights as (outputs, inputs), "
            "beside layers of this model that store them as (inputs, outputs); an adapter has one order for all: "
            "leave out either",
        )
    return Trainables(tuple(targets), tuple(saved), transposed == {True}, total)


def load_trainable_model(
    folder: Path,
    spec_method: Mapping[str, Any],
    *,
    precision: str,
    seed: int,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """The model in `folder` on `device`, of which exactly what spec.method asks for requires gradients.

    A frozen base is held in `precision` (bf16 or fp32), or quantized while it is read; what trains is float32. An
    adapter starts from `seed`. Raises what find_trainables and load_causal_model raise.
    """
    method = parse_method(spec_method)
    trainables = find_trainables(load_skeleton(folder, trust_remote_code=trust_remote_code), method)
    narrow = torch.bfloat16 if precision == "bf16" else torch.float32
    quantization = None
    if method.quantization != "none":
        quantization = Quantization(method.quantization, narrow, trainables.saved, device)
    model = load_causal_model(
        folder,
        dtype=torch.float32 if method.lora is None else narrow,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    model.config.use_cache = False
    if method.lora is not None:
        model = add_adapter(model, method.lora, trainables, seed)
    # torch's own `to`: transformers' refuses to move quantized weights, which are where they should be already
    torch.nn.Module.to(model, device)
    found = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    if found != trainables.parameters:
        raise RuntimeError(f"{found} parameters require gradients, arithmetic gives {trainables.parameters}")
    return model


def add_adapter(model: Any, lora: Lora, trainables: Trainables, seed: int) -> Any:
    """`model` with a new adapter in float32, started from `seed`; everything else is frozen."""
    narrow = model.dtype
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora_config(lora, trainables), adapter_name=_ADAPTER)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if narrow != torch.float32:
        # The frozen modules behind a saved one, such as norms, have kernels for their own dtype only.
        for module in adapted.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.register_forward_hook(lambda _module, _inputs, output: _narrowed(output, narrow))
    return adapted


def lora_config(lora: Lora, trainables: Trainables) -> LoraConfig:
    """peft's config of the adapter. Saved modules have their full names: to peft, `norm` means `input_norm` too."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets),
        modules_to_save=list(trainables.saved) or None,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        fan_in_fan_out=trainables.linear_is_transposed,
        bias="none",
    )


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains, sorted by the name that checkpoints and files give it."""
    named = {file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def file_name(parameter: str) -> str:
    """The name that peft gives a parameter in an adapter file, which has no adapter's name; others keep theirs."""
    if parameter.endswith(_MAGNITUDE):
        return parameter.removesuffix(f".{_ADAPTER}.weight")
    if _SAVED in parameter:
        return parameter.replace(_SAVED, ".", 1)
    return parameter.replace(f".{_ADAPTER}.", ".", 1) if ".lora_" in parameter else parameter


def encode_adapter_config(model: Any, source: str) -> bytes | None:
    """adapter_config.json as peft writes it, with `source` as the base model and sets in a fixed order.

    None for a model without an adapter.
    """
    configs = getattr(model, "peft_config", None)
    return None if configs is None else encode_peft_config(configs[_ADAPTER], source)


def encode_peft_config(config: Any, source: str) -> bytes:
    """adapter_config.json of one of peft's configs."""
    value = config.to_dict()
    value.update(base_model_name_or_path=source, inference_mode=True)
    plain = {key: sorted(entry) if isinstance(entry, set) else entry for key, entry in value.items()}
    return json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"


@contextmanager
def deterministic(model: Any) -> Iterator[None]:
    """No dropout, and each row's logits by its own tokens alone: what a comparison of logits needs.

    int8 layers keep the arithmetic of training, which on the CPU is another than in evaluation, and treat no columns
    apart for large values (LLM.int8's outliers are looked for in all rows of a batch together).
    """
    model.eval()
    states = []
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):
            module.train()
            states.append((module.state, module.state.threshold))
            module.state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in states:
            state.threshold = threshold
        model.train()


def _find_targets(model: Any, lora: Lora, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The linear layers that get an adapter, by full name. Like peft, what is saved as a whole gets none."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    free = {name: module for name, module in linear.items() if not any(_is_within(name, whole) for whole in saved)}
    if lora.targets == (ALL_LINEAR,):
        output = model.get_output_embeddings()
        found = {name: module for name, module in free.items() if module is not output}
        if not found:
            raise UserError(
                "UnknownTargetModule",
                f"method.lora.targetModules is {ALL_LINEAR} and the model has no linear layer but its output layer",
            )
        return found
    found = {}
    for target in sorted(lora.targets):
        matched = {name: module for name, module in free.items() if _fits(name, target)}
        if not matched and any(_fits(name, target) for name in linear):
            raise UserError(
                "InvalidMethod",
                f"method.lora.targetModules: {target!r} is trained as a whole by method.lora.modulesToSave: "
                "name it in one of the two",
            )
        if not matched:
            raise UserError(
                "UnknownTargetModule",
                f"method.lora.targetModules: {target!r} names no linear layer of the model, which has "
                f"{_listed(linear)}",
            )
        found.update(matched)
    for name, module in found.items():
        _check_untied(model, name, module, "targetModules")
    return {name: module for name, module in linear.items() if name in found}


def _find_saved(model: Any, lora: Lora) -> dict[str, Any]:
    """The modules that are trained as a whole, by full name."""
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, Any] = {}
    for wanted in lora.saved:
        matched = {name: module for name, module in modules.items() if _fits(name, wanted) and _numel(module)}
        if not matched:
            whole = {name: module for name, module in modules.items() if any(True for _ in module.parameters(False))}
            raise UserError(
                "UnknownModuleToSave",
                f"method.lora.modulesToSave: {wanted!r} names no module with weights of the model, which has "
                f"{_listed(whole)}",
            )
        found.update(matched)
    for name, module in found.items():
        outer = next((other for other in found if other != name and _is_within(name, other)), None)
        if outer:
            raise UserError(
                "InvalidMethod",
                f"method.lora.modulesToSave names {name!r} and {outer!r}, which contains it: remove one of them",
            )
        _check_untied(model, name, module, "modulesToSave")
    return found


def _check_untied(model: Any, name: str, module: Any, field: str) -> None:
    """UserError where a weight of `module` is used by another module too: a file has it once, with one value."""
    own = {id(parameter) for parameter in module.parameters()}
    for other, part in model.named_modules():
        if _is_within(other, name):
            continue
        if any(id(parameter) in own for parameter in part.parameters(recurse=False)):
            raise UserError(
                "TiedEmbeddings",
                f"method.lora.{field} names {name!r}, whose weight the model also uses as {other!r} (tied embeddings): "
                "trained in one place only, it could not be stored in the base's layout; leave it out, or use "
                "method.type full, which trains both as one",
            )


def _inputs_and_outputs(module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return int(inputs), int(outputs)
    return int(module.in_features), int(module.out_features)


def _numel(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fits(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _is_within(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _listed(modules: Mapping[str, Any]) -> str:
    known = Counter(name.rsplit(".", 1)[-1] for name in modules)
    return ", ".join(f"{name} ({count})" for name, count in sorted(known.items()))


def _narrowed(output: Any, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output
