"""Small stand-ins for the vendor's entry points, so that backends/neuron.py runs without the vendor's packages.

They do what the vendor's do as far as the backend relies on it, on one rank and on the CPU, and record every call in
order. What the vendor's own code makes of these calls was tried with that code (docs/design/0024); here the calls
themselves are held: their order, their arguments, and what the backend does with what comes back.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from finetune_trainer.backends import neuron

VOCABULARY = 300


@dataclass
class Calls:
    """Every call of the vendor's in order: (name, arguments)."""

    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, name: str, **arguments: Any) -> None:
        self.made.append((name, arguments))

    def names(self) -> list[str]:
        return [name for name, _ in self.made]

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for made, arguments in self.made if made == name]


class FakeModel(torch.nn.Module):
    """A model with what the backend asks of the vendor's: summed loss with labels that it shifts itself."""

    def __init__(self, dtype: torch.dtype, calls: Calls) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.config = SimpleNamespace(vocab_size=VOCABULARY, use_cache=True)
        self.embed = torch.nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator).to(dtype))
        self.norm = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        self.head = torch.nn.Parameter((torch.randn(VOCABULARY, 8, generator=generator) / 8).to(dtype))
        self._calls = calls

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        self._calls.add("forward", shape=tuple(input_ids.shape), training=self.training, **options)
        hidden = functional.dropout(self.embed[input_ids] * self.norm, 0.1, self.training)
        logits = (hidden @ self.head.T).float()[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction=options["reduction"])
        return SimpleNamespace(loss=loss)


class FakeZero:
    """ZeRO-1 with float32 masters and float32 gradients, on one rank."""

    sharding_groups = ((0,),)

    def __init__(self, groups: list[dict[str, Any]], max_norm: float, options: dict[str, Any]) -> None:
        self.max_norm = max_norm
        self._options = options
        self.param_groups = [{**options, **group} for group in groups]
        self.grad_norm: torch.Tensor | None = None
        self._make_masters()

    def _make_masters(self) -> None:
        masters = [
            {**group, "params": [torch.nn.Parameter(p.detach().float()) for p in group["params"]]}
            for group in self.param_groups
        ]
        self.base_optimizer = torch.optim.AdamW(masters, **self._options)

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        for group, masters in zip(self.param_groups, self.base_optimizer.param_groups, strict=True):
            masters["lr"] = group["lr"]
            yield from zip(group["params"], masters["params"], strict=True)

    def _shard_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _get_params_and_grad_norm(self, _norm_type: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        shards = [master for _, master in self._pairs()]
        return shards, torch.stack([shard.grad.norm() for shard in shards]).norm()

    def step(self) -> None:
        for parameter, master in self._pairs():
            master.grad = parameter.grad.float()
        shards, self.grad_norm = self._get_params_and_grad_norm(2.0)
        for shard in shards:
            shard.grad.mul_(min(1.0, self.max_norm / float(self.grad_norm)))
        self.base_optimizer.step()
        self._round()

    def _round(self) -> None:
        for parameter, master in self._pairs():
            parameter.data.copy_(master.data)

    def zero_grad(self) -> None:
        for parameter, _ in self._pairs():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        masters = {number: master.data for number, (_, master) in enumerate(self._pairs())}
        state = self.base_optimizer.state_dict()
        return {"state": {}, "base_state": state["state"], "sharded_master_weights": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._make_masters()  # of the weights as they are now, as the vendor does
        own = self.base_optimizer.state_dict()
        self.base_optimizer.load_state_dict({**own, "state": copy.deepcopy(state["base_state"])})
        for number, (_, master) in enumerate(self._pairs()):
            master.data.copy_(state["sharded_master_weights"][number])
        self._round()


@dataclass
class FakeNxdOptimizer:
    """The vendor's wrapper around it."""

    optimizer: FakeZero

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def grad_norm(self) -> torch.Tensor | None:
        return self.optimizer.grad_norm

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the stand-ins where the backend imports the vendor's modules from; the calls that it will make."""
    calls = Calls()

    def config(**arguments: Any) -> dict[str, Any]:
        calls.add("neuronx_distributed_config", is_grouped=torch.distributed.is_initialized(), **arguments)
        return arguments

    def training_config(**arguments: Any) -> SimpleNamespace:
        calls.add("TrainingNeuronConfig", **arguments)
        return SimpleNamespace(**arguments)

    class NeuronModelForCausalLM:
        @staticmethod
        def from_pretrained(path: str, trn_config: Any, **arguments: Any) -> FakeModel:
            calls.add("from_pretrained", path=path, trn_config=trn_config, **arguments)
            return FakeModel(arguments["dtype"], calls)

    def make_optimizer(
        nxd_config: Any, kind: type, parameters: Any, *, max_norm: float, **options: Any
    ) -> FakeNxdOptimizer:
        calls.add("initialize_parallel_optimizer", nxd_config=nxd_config, kind=kind, max_norm=max_norm, **options)
        return FakeNxdOptimizer(FakeZero(parameters, max_norm, options))

    def save(home: str, tag: str, **arguments: Any) -> None:
        folder = Path(home) / tag
        calls.add("save_checkpoint", folder=folder, existed=folder.exists(), **arguments)
        for part, value in (("model", arguments["model"]), ("optim", arguments["optimizer"].optimizer.state_dict())):
            path = folder / part / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
            path.parent.mkdir(parents=True)
            torch.save(value, path)
        torch.save(arguments["user_content"], folder / "user_content.pt")
        (folder / "checkpoint").write_text("1")
        (folder / "done").write_text("1")

    def load(home: str, tag: str, model: Any = None, optimizer: Any = None) -> Any:
        folder = Path(home) / tag
        calls.add("load_checkpoint", model=model is not None, optimizer=optimizer is not None)
        file = "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        if optimizer is not None:
            optimizer.optimizer.load_state_dict(torch.load(folder / "optim" / file, weights_only=True))
        if model is not None:
            model.update(torch.load(folder / "model" / file, weights_only=True))
        return torch.load(folder / "user_content.pt", weights_only=True)

    state = {
        "initialize_model_parallel": lambda **sizes: calls.add("initialize_model_parallel", **sizes),
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_group": lambda: None,
        "get_pipeline_model_parallel_rank": lambda: 0,
        "get_data_parallel_rank": lambda: 0,
        "get_data_parallel_size": lambda: 1,
    }
    names = {
        "neuronx_distributed": {},
        "neuronx_distributed.parallel_layers": {},
        "neuronx_distributed.parallel_layers.parallel_state": state,
        "neuronx_distributed.parallel_layers.grads": {"get_grad_norm": None},
        "neuronx_distributed.trainer": {
            "neuronx_distributed_config": config,
            "initialize_parallel_optimizer": make_optimizer,
        },
        "neuronx_distributed.trainer.checkpoint": {
            "save_checkpoint": save,
            "load_checkpoint": load,
            "finalize_checkpoint": lambda: calls.add("finalize_checkpoint"),
        },
        "neuronx_distributed.utils": {"cpu_mode": lambda: True, "mark_step": lambda: calls.add("mark_step")},
        "neuronx_distributed.utils.model_utils": {"move_model_to_device": None},
        "optimum": {},
        "optimum.neuron": {},
        "optimum.neuron.models": {},
        "optimum.neuron.models.training": {
            "NeuronModelForCausalLM": NeuronModelForCausalLM,
            "GQAQKVColumnParallelLinearSpec": None,
            "create_parameter_metadata": lambda model: {"parameters": sorted(dict(model.named_parameters()))},
        },
        "optimum.neuron.models.training.config": {"TrainingNeuronConfig": training_config},
        "optimum.neuron.peft": {"get_peft_model": None},
    }
    for name, values in names.items():
        module = ModuleType(name)
        module.__path__ = []
        for key, value in values.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    groups: Any = sys.modules["neuronx_distributed.parallel_layers"]
    groups.parallel_state, groups.layers = SimpleNamespace(**state), SimpleNamespace()
    monkeypatch.setattr(neuron, "check_vendor", lambda: calls.add("check_vendor"))
    return calls


def write_config(folder: Path) -> None:
    """config.json of a model that the backend can take the size of."""
    value = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(value))
