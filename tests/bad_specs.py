"""Wrong specs, each with the field that must be named and, for rules of our own, the message.

Unit tests hold parse_job and the trainer's check_spec to this table, contract tests the API server: all have to refuse
the same things.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BadSpec:
    """`change` is merged into a good spec (None removes); `field` is named by whoever refuses, with `message`."""

    id: str
    field: str
    change: dict[str, Any]
    message: str = ""
    """Part of the message; empty where the API server has words of its own for a type, a bound or an enumeration."""
    ours: str = ""
    """Part of parse_job's message where it differs from the API server's."""
    name: str = field(default="bad")
    """metadata.name of the object."""


TRAINIUM = {"type": "neuron", "instanceType": "ml.trn1.32xlarge"}
_SOURCE = "hf://org/name, s3://bucket/prefix or workspace:///path"

BAD_SPECS = (
    BadSpec(
        "neither maxSteps nor epochs", "spec.training.maxSteps", {"training": {"maxSteps": None}}, "exactly one of"
    ),
    BadSpec("both maxSteps and epochs", "spec.training.maxSteps", {"training": {"epochs": 2}}, "exactly one of"),
    BadSpec(
        "more warm-up than steps",
        "spec.training.warmupSteps",
        {"training": {"warmupSteps": 41}},
        "warmupSteps must be at most maxSteps, 41 is more than 40",
    ),
    BadSpec("zero steps", "spec.training.maxSteps", {"training": {"maxSteps": 0}}, ours="at least 1"),
    BadSpec(
        "a learning rate of 0", "spec.training.learningRate", {"training": {"learningRate": 0}}, ours="more than 0"
    ),
    BadSpec(
        "no learning rate", "spec.training.learningRate", {"training": {"learningRate": None}}, ours="set spec.training"
    ),
    BadSpec(
        "a learning rate that YAML reads as text",
        "spec.training.learningRate",
        {"training": {"learningRate": "2e-5"}},
        ours="without quotes",
    ),
    BadSpec("half a step", "spec.training.maxSteps", {"training": {"maxSteps": 1.5}}, ours="whole number"),
    BadSpec(
        "an unknown precision", "spec.training.precision", {"training": {"precision": "fp8"}}, ours="'bf16' or 'fp32'"
    ),
    BadSpec("a bare hub name as model", "spec.model.source", {"model": {"source": "meta-llama/Llama-3"}}, _SOURCE),
    BadSpec("a hub source without organisation", "spec.model.source", {"model": {"source": "hf://gpt2"}}, _SOURCE),
    BadSpec("a local path as dataset", "spec.dataset.source", {"dataset": {"source": "/data/faq"}}, _SOURCE),
    BadSpec(
        "a web address as dataset", "spec.dataset.source", {"dataset": {"source": "https://a/b"}}, "is https://a/b"
    ),
    BadSpec(
        "a workspace path that climbs out",
        "spec.dataset.source",
        {"dataset": {"source": "workspace:///a/../../b"}},
        "without `..`",
    ),
    BadSpec(
        "files that climb out", "spec.dataset.files", {"dataset": {"files": "../*.jsonl"}}, "glob below the source"
    ),
    BadSpec("files from the root", "spec.dataset.files", {"dataset": {"files": "/etc/*"}}, "glob below the source"),
    BadSpec("an unknown format", "spec.dataset.format", {"dataset": {"format": "dollly"}}, ours="did you mean 'dolly'"),
    BadSpec("rows of 8 tokens", "spec.dataset.maxLength", {"dataset": {"maxLength": 8}}, ours="at least 16"),
    BadSpec(
        "all records held out",
        "spec.dataset.validationPercent",
        {"dataset": {"validationPercent": 100}},
        ours="at most 50",
    ),
    BadSpec(
        "lora without its fields", "spec.method.lora", {"method": {"lora": None}}, "lora is required with type lora"
    ),
    BadSpec(
        "lora fields with full", "spec.method.lora", {"method": {"type": "full"}}, "lora cannot be set with type full"
    ),
    BadSpec(
        "full training of quantized weights",
        "spec.method.quantization",
        {"method": {"type": "full", "lora": None, "quantization": "nf4"}},
        "quantization must be none with type full",
    ),
    BadSpec(
        "the format template without one",
        "spec.dataset.template",
        {"dataset": {"format": "template"}},
        "template is required with format template",
    ),
    BadSpec(
        "a template with another format",
        "spec.dataset.template",
        {"dataset": {"template": {"prompt": "{question}", "completion": "{answer}"}}},
        "template is for format template",
    ),
    BadSpec(
        "all-linear beside a name",
        "spec.method.lora.targetModules",
        {"method": {"lora": {"targetModules": ["all-linear", "q_proj"]}}},
        "all-linear alone or names",
    ),
    BadSpec(
        "sharded quantized weights",
        "spec.parallelism.strategy",
        {"parallelism": {"strategy": "fsdp"}, "method": {"quantization": "int8"}},
        "quantized weights cannot be sharded",
    ),
    BadSpec(
        "sharding by torch on Trainium",
        "spec.parallelism.strategy",
        {
            "parallelism": {"strategy": "fsdp"},
            "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge"},
        },
        "fsdp, which is for accelerator types cpu and cuda",
    ),
    BadSpec(
        "a placeholder by position",
        "spec.dataset.template.prompt",
        {"dataset": {"format": "template", "template": {"prompt": "{}: ", "completion": "{answer}"}}},
        "prompt must have each field of the record in single braces by its name alone",
    ),
    BadSpec(
        "a brace that is not closed",
        "spec.dataset.template.completion",
        {"dataset": {"format": "template", "template": {"prompt": "{question}", "completion": "{answer"}}},
        "a brace of its own doubled",
    ),
    BadSpec(
        "a placeholder that formats",
        "spec.dataset.template.prompt",
        {"dataset": {"format": "template", "template": {"prompt": "{question!r:>10}", "completion": "{answer}"}}},
        "by its name alone",
    ),
    BadSpec(
        "a completion that is always the same",
        "spec.dataset.template.completion",
        {"dataset": {"format": "template", "template": {"prompt": "{question}", "completion": "{{answer}}"}}},
        "without one every answer is the same",
    ),
    BadSpec(
        "a module trained as a whole and by an adapter",
        "spec.method.lora.modulesToSave",
        {"method": {"lora": {"modulesToSave": ["lm_head", "v_proj"]}}},
        "a module is trained as a whole or has an adapter",
        ours="; remove v_proj from one of them",
    ),
    BadSpec(
        "every linear layer trained as a whole",
        "spec.method.lora.modulesToSave",
        {"method": {"lora": {"modulesToSave": ["all-linear"]}}},
        "and not all-linear",
    ),
    BadSpec(
        "a context in a format without one",
        "spec.evaluate.prompts",
        {"dataset": {"format": "samsum"}, "evaluate": {"prompts": [{"text": "a"}, {"text": "b", "context": "c"}]}},
        "dataset.format samsum has no place for one",
        ours="; it is in prompts 1",
    ),
    BadSpec(
        "quantized weights on Trainium",
        "spec.method.quantization",
        {
            "method": {"quantization": "nf4"},
            "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge"},
        },
        "method.quantization is nf4, which is for accelerator types cpu and cuda",
    ),
    BadSpec(
        "DoRA on Trainium",
        "spec.method.lora.variant",
        {
            "method": {"lora": {"variant": "dora"}},
            "accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge"},
        },
        "method.lora.variant is dora, which is for accelerator types cpu and cuda",
    ),
    BadSpec(
        "modules trained as a whole on Trainium",
        "spec.method.lora.modulesToSave",
        {"method": {"lora": {"modulesToSave": ["lm_head"]}}, "accelerator": TRAINIUM},
        "method.lora.modulesToSave is for accelerator types cpu and cuda",
    ),
    BadSpec(
        "an adapter on one block of a model on Trainium",
        "spec.method.lora.targetModules",
        {"method": {"lora": {"targetModules": ["q_proj", "layers.3.mlp.down_proj"]}}, "accelerator": TRAINIUM},
        "by these names alone",
        ours="remove layers.3.mlp.down_proj",
    ),
    BadSpec(
        "an adapter on a layer that Trainium's models do not have",
        "spec.method.lora.targetModules",
        {"method": {"lora": {"targetModules": ["query_key_value"]}}, "accelerator": TRAINIUM},
        "must be all-linear or some of q_proj, k_proj, v_proj",
    ),
    BadSpec(
        "an adapter on half of a fused layer",
        "spec.method.lora.targetModules",
        {"method": {"lora": {"targetModules": ["q_proj", "up_proj"]}}, "accelerator": TRAINIUM},
        "both of gate_proj and up_proj or none",
        ours="add gate_proj",
    ),
    BadSpec(
        "float32 on Trainium",
        "spec.training.precision",
        {"training": {"precision": "fp32"}, "accelerator": TRAINIUM},
        "training.precision is fp32, and with accelerator type neuron it must be bf16",
    ),
    BadSpec(
        "rows that the flash attention kernel does not take",
        "spec.dataset.maxLength",
        {"dataset": {"maxLength": 5000, "packing": "none"}, "accelerator": TRAINIUM},
        "must be a multiple of 2048 with accelerator type neuron, where the flash attention kernel takes no other "
        "length, is 5000",
        ours="use 4096 or 6144",
    ),
    BadSpec(
        "packed rows that flash attention cannot keep apart",
        "spec.dataset.packing",
        {"dataset": {"maxLength": 4096, "packing": "bestFit"}, "accelerator": TRAINIUM},
        "maxLength is 4096 and pipelineParallelSize 1: use none (a record a row), or wrapped",
    ),
    BadSpec(
        "packed rows that pipeline stages cannot keep apart",
        "spec.dataset.packing",
        {"parallelism": {"pipelineParallelSize": 2}, "accelerator": TRAINIUM},
        "maxLength is 256 and pipelineParallelSize 2: use none (a record a row), or wrapped",
    ),
    BadSpec(
        "no target module",
        "spec.method.lora.targetModules",
        {"method": {"lora": {"targetModules": []}}},
        ours="at least 1",
    ),
    BadSpec("no rank", "spec.method.lora.rank", {"method": {"lora": {"rank": None}}}, ours="rank is required"),
    BadSpec("certain dropout", "spec.method.lora.dropout", {"method": {"lora": {"dropout": 1}}}, ours="less than 1"),
    BadSpec(
        "a GPU without instance type",
        "spec.accelerator.instanceType",
        {"accelerator": {"type": "cuda"}},
        "instanceType is required with type cuda and neuron",
    ),
    BadSpec(
        "processes a node on Trainium",
        "spec.accelerator.processesPerNode",
        {"accelerator": {"type": "neuron", "instanceType": "ml.trn1.32xlarge", "processesPerNode": 2}},
        "processesPerNode is 2, but is for type cpu",
    ),
    BadSpec("no nodes", "spec.accelerator.nodes", {"accelerator": {"nodes": 0}}, ours="at least 1"),
    BadSpec(
        "three-way tensor parallelism on two processes",
        "spec.parallelism",
        {"parallelism": {"tensorParallelSize": 3}},
        "but 2 x 1 is none of 3 x 1",
    ),
    BadSpec("no claim", "spec.workspace", {"workspace": None}, ours="workspace is required"),
    BadSpec(
        "a claim that is no name", "spec.workspace.claimName", {"workspace": {"claimName": "My_Claim"}}, ours="match"
    ),
    BadSpec(
        "a gate without held-out records",
        "spec.evaluate.gate",
        {"dataset": {"validationPercent": 0}, "evaluate": {"gate": {"maxPerplexity": 20}}},
        "evaluate.gate needs a held-out loss",
    ),
    BadSpec("a gate without a threshold", "spec.evaluate.gate", {"evaluate": {"gate": {}}}, "gate has no threshold"),
    BadSpec(
        "a gate on answers that nobody gave",
        "spec.evaluate.gate",
        {"evaluate": {"gate": {"minRougeL": 0.5}, "prompts": [{"text": "Who?"}]}},
        "evaluate.gate needs answers to compare with",
    ),
    BadSpec(
        "an exact match above all",
        "spec.evaluate.gate.minExactMatch",
        {"evaluate": {"gate": {"minExactMatch": 1.5}}},
        ours="at most 1",
    ),
    BadSpec("no temperature", "spec.evaluate.temperature", {"evaluate": {"temperature": 0}}, ours="more than 0"),
    BadSpec("more than all tokens", "spec.evaluate.topP", {"evaluate": {"topP": 1.1}}, ours="at most 1"),
    BadSpec(
        "a gate without evaluation",
        "spec.evaluate.gate",
        {"evaluate": {"enabled": False, "gate": {"maxLossRatioToBase": 0.9}}},
        "evaluate.gate needs a held-out loss",
    ),
    BadSpec(
        "held-out loss without held-out records",
        "spec.training.evaluateEverySteps",
        {"dataset": {"validationPercent": 0}, "training": {"evaluateEverySteps": 5}},
        "training.evaluateEverySteps needs held-out records",
    ),
    BadSpec(
        "held-out loss every no step",
        "spec.training.evaluateEverySteps",
        {"training": {"evaluateEverySteps": 0}},
        ours="at least 1",
    ),
    BadSpec(
        "an evaluation of nothing",
        "spec.evaluate",
        {"dataset": {"validationPercent": 0}, "evaluate": {"prompts": None}},
        "evaluate has nothing to do",
    ),
    BadSpec(
        "an empty prompt", "spec.evaluate.prompts[0].text", {"evaluate": {"prompts": [{"text": ""}]}}, ours="at least 1"
    ),
    BadSpec(
        "more prompts than an annotation holds",
        "spec.evaluate.prompts",
        {
            "evaluate": {
                "prompts": [{"text": "a" * 8192, "context": "b" * 16384, "expected": "c" * 8192}, {"text": "d"}]
            }
        },
        "at most 32768 characters in all",
    ),
    BadSpec(
        "a stage that may take no time",
        "spec.stages.merge.activeDeadlineSeconds",
        {"stages": {"merge": {"activeDeadlineSeconds": 0}}},
        ours="at least 1",
    ),
    BadSpec(
        "a hang of a moment",
        "spec.stages.train.hangSeconds",
        {"stages": {"train": {"hangSeconds": 29}}},
        ours="at least 30",
    ),
    BadSpec("shards of 5 quarts", "spec.merge.maxShardSize", {"merge": {"maxShardSize": "5 quarts"}}, ours="match"),
    BadSpec(
        "an endpoint without upload",
        "spec.publish.s3",
        {"publish": {"sageMakerEndpoint": {"instanceType": "ml.g5.4xlarge"}}},
        "s3 is required",
    ),
    BadSpec(
        "a whole model that is never merged",
        "spec.publish.s3.contents",
        {"publish": {"s3": {"uri": "s3://bucket/a", "contents": "both"}}, "merge": {"enabled": False}},
        "no whole model",
    ),
    BadSpec(
        "an adapter of full fine-tuning",
        "spec.publish.s3.contents",
        {"publish": {"s3": {"uri": "s3://bucket/a", "contents": "adapter"}}, "method": {"type": "full", "lora": None}},
        "leaves no adapter",
    ),
    BadSpec("a negative deadline", "spec.activeDeadlineSeconds", {"activeDeadlineSeconds": -1}, ours="at least 1"),
    BadSpec(
        "too many retries", "spec.retryPolicy.maxRetries", {"retryPolicy": {"maxRetries": 101}}, ours="at most 100"
    ),
    BadSpec(
        "a quantity that is none",
        "spec.stages.train.resources.limits.memory",
        {"stages": {"train": {"resources": {"limits": {"memory": "lots"}}}}},
        ours="match",
    ),
    BadSpec(
        "a toleration of nothing",
        "spec.stages.merge.tolerations[0].key",
        {"stages": {"merge": {"tolerations": [{"value": "x"}]}}},
        "key is required with operator Equal",
    ),
    BadSpec(
        "a toleration of a value that may be any",
        "spec.stages.merge.tolerations[0].value",
        {"stages": {"merge": {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}}},
        "value must be absent with operator Exists",
    ),
    BadSpec(
        "an environment variable without a name",
        "spec.stages.train.env[0].name",
        {"stages": {"train": {"env": [{"name": "1x"}]}}},
        ours="match",
    ),
    BadSpec(
        "a misspelt field", "spec.training.learninRate", {"training": {"learninRate": 1}}, ours="mean learningRate"
    ),
    BadSpec("a name with a dot", "metadata.name", {}, "lower-case letters, digits and `-`", name="llama.3"),
    BadSpec("a name that begins with a digit", "metadata.name", {}, "beginning with a letter", name="3b"),
)
