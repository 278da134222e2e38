"""Which software runs on which Trainium instances: one table of instance family, Neuron SDK, base image, torch and
optimum-neuron, and for each row whether it is known to work, how that was looked at, and the source.

images/ takes the base image of the Trainium trainer from here, the operator's preflight refuses a pair that is known
not to work before anything is started, and the stages compile and train hold what is installed to it at their start.
Standard library only; no I/O. Nothing in this table ran on a Trainium device of ours: `checked` says what was done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["works", "doubtful", "broken"]
Checked = Literal["vendor's code run on CPU", "vendor's code read", "documentation only"]

_PREFIX = "ml."
_SDK_IN_IMAGE = re.compile(r"sdk(\d+\.\d+\.\d+)")

DLC_ACCOUNT = "763104351884"
"""AWS account whose container registry holds the deep learning containers, in each region."""
DLC_REGION = "us-east-1"

_HF_2_26 = "huggingface-pytorch-training-neuronx:2.8.0-transformers4.55.4-neuronx-py310-sdk2.26.0-ubuntu22.04"
_AWS_2_28 = "pytorch-training-neuronx:2.9.0-neuronx-py312-sdk2.28.0-ubuntu24.04"

_WALKTHROUGH = "awslabs/awsome-distributed-training, 3.test_cases/pytorch/optimum-neuron/llama3"
_PINS = "optimum-neuron 0.4.5, pyproject.toml and optimum/neuron/version.py"
_CONTAINER = "aws/deep-learning-containers, huggingface/pytorch/training/docker/2.8/py3/sdk2.26.0/Dockerfile.neuronx"
_XLA_END = "Neuron SDK documentation, announcement “end of support for PyTorch/XLA training” (Neuron 2.30)"
_TORCH_NEURON = "Neuron SDK documentation, “PyTorch on Neuron” (2.32 and 2.33)"


@dataclass(frozen=True)
class Stack:
    """One row. `image` is repository:tag below DLC_ACCOUNT's registry, "" where there is none to start from."""

    family: str
    """Instance family, the part of the type's name before the dot: trn1 for ml.trn1.32xlarge."""
    sdk: str
    image: str
    python: str
    torch: str
    optimum_neuron: str
    """Version, "" where no release of it runs on this SDK."""
    verdict: Verdict
    why: str
    checked: Checked
    source: str


RELEASE_SDK = "2.26.0"
"""SDK of the base image that this release's Trainium image is built on."""

STACKS: tuple[Stack, ...] = (
    Stack(
        "trn1",
        RELEASE_SDK,
        _HF_2_26,
        "3.10",
        "2.8.0",
        "0.4.5",
        "works",
        "the published walkthrough's own stack, and the SDK that optimum-neuron 0.4.5 is pinned to (2.26)",
        "vendor's code run on CPU",
        f"{_WALKTHROUGH}/kubernetes/fine-tuning/Dockerfile and README.md; {_CONTAINER}; {_PINS}",
    ),
    Stack(
        "trn1n",
        RELEASE_SDK,
        _HF_2_26,
        "3.10",
        "2.8.0",
        "0.4.5",
        "works",
        "trn1 with twice the network interfaces; the walkthrough lists it as tested",
        "vendor's code run on CPU",
        f"{_WALKTHROUGH}/kubernetes/fine-tuning/README.md; {_PINS}",
    ),
    Stack(
        "trn2",
        RELEASE_SDK,
        _HF_2_26,
        "3.10",
        "2.8.0",
        "0.4.5",
        "doubtful",
        "the walkthrough lists it as tested with tensor parallel size 4, on a stack for which AWS ends training; "
        "copied key and value heads train apart there, so tensor parallel sizes above the model's are refused",
        "vendor's code read",
        f"{_WALKTHROUGH}/kubernetes/fine-tuning/README.md; {_XLA_END}; neuronx-distributed 0.15, modules/qkv_linear.py",
    ),
    Stack(
        "trn1",
        "2.28.0",
        _AWS_2_28,
        "3.12",
        "2.9.0",
        "",
        "broken",
        "its container has Python 3.12 and torch 2.9, and optimum-neuron 0.4.5 needs Python below 3.12 and torch 2.8",
        "documentation only",
        "awslabs/awsome-distributed-training, 3.test_cases/pytorch/neuronx-distributed/llama3/kubernetes/Dockerfile; "
        f"{_PINS}",
    ),
    Stack(
        "trn1",
        "2.20.0",
        "huggingface-pytorch-training-neuronx:2.1.2-transformers4.43.2-neuronx-py310-sdk2.20.0-ubuntu20.04-v1.0",
        "3.10",
        "2.1.2",
        "0.1.0",
        "broken",
        "the walkthrough's first stack: torch 2.1 has none of the checkpoint functions that are used here; what it "
        "wrote can be consolidated",
        "documentation only",
        "aws-samples/awsome-distributed-training, "
        "3.test_cases/pytorch/optimum-neuron/llama3/kubernetes/fine-tuning/Dockerfile at 0cf6337",
    ),
    *(
        Stack(
            family,
            sdk,
            "",
            "",
            "",
            "",
            "broken",
            f"Neuron {sdk} has no PyTorch/XLA training any more, on which optimum-neuron 0.4.5 is built",
            "documentation only",
            _XLA_END,
        )
        for family in ("trn1", "trn1n", "trn2")
        for sdk in ("2.30.0", "2.31.0")
    ),
    Stack(
        "trn2",
        "2.33.0",
        "",
        "3.12",
        "",
        "",
        "broken",
        "it trains with TorchNeuron, for which this release has no backend",
        "documentation only",
        _TORCH_NEURON,
    ),
    Stack(
        "trn3",
        RELEASE_SDK,
        "",
        "",
        "",
        "",
        "broken",
        "Trainium3 is younger than this SDK and trains with TorchNeuron, for which this release has no backend",
        "documentation only",
        _TORCH_NEURON,
    ),
    Stack(
        "inf2",
        RELEASE_SDK,
        "",
        "",
        "",
        "",
        "broken",
        "Inferentia2 is made for inference: neither the walkthrough nor optimum-neuron's training lists it",
        "documentation only",
        f"{_WALKTHROUGH}/kubernetes/fine-tuning/README.md; optimum-neuron 0.4.5, "
        "docs/source/supported_architectures.mdx",
    ),
)
"""Every pair of which something is known; a pair that is not here is neither refused nor vouched for."""


def instance_family(instance_type: str) -> str:
    """The part of an instance type's name before its size, without SageMaker's prefix: trn1 for ml.trn1.32xlarge."""
    return instance_type.removeprefix(_PREFIX).partition(".")[0]


def find_stack(instance_type: str, sdk: str = RELEASE_SDK) -> Stack | None:
    """The row of a pair; None where the table does not have it."""
    family = instance_family(instance_type)
    return next((row for row in STACKS if row.family == family and row.sdk == sdk), None)


def sdk_of_image(reference: str) -> str:
    """The SDK that an image's name tells, as the deep learning containers' do (…-sdk2.26.0-…); else the release's."""
    found = _SDK_IN_IMAGE.search(reference)
    return found.group(1) if found else RELEASE_SDK


def base_image(family: str = "trn1", *, region: str = DLC_REGION) -> str:
    """Reference of the image that ours for Trainium is built on. KeyError where the release has none for `family`."""
    row = next((row for row in STACKS if row.family == family and row.sdk == RELEASE_SDK and row.image), None)
    if row is None:
        raise KeyError(f"no base image of SDK {RELEASE_SDK} for {family}: see STACKS")
    return f"{DLC_ACCOUNT}.dkr.ecr.{region}.amazonaws.com/{row.image}"


def sound_types(sdk: str = RELEASE_SDK) -> tuple[str, ...]:
    """Families that are not known to be broken with `sdk`, the surest first."""
    order: tuple[Verdict, ...] = ("works", "doubtful")
    return tuple(row.family for verdict in order for row in STACKS if row.sdk == sdk and row.verdict == verdict)
