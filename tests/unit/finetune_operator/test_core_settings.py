"""Which image a stage runs in, and which Neuron stages have none that can use their devices."""

from __future__ import annotations

import pytest

from finetune_operator.core.settings import BUILT_IN_DEFAULTS, Settings, StageDefaults
from finetune_trainer import contract

TORCH, NEURON, OWN = "registry.example/trainer:1", "registry.example/neuron:1", "registry.example/own:1"
BOTH = Settings(trainer_image=TORCH, neuron_image=NEURON)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "neuron"])
def test_only_the_stages_on_neuron_devices_run_in_the_neuron_image(accelerator: str) -> None:
    on_devices = {contract.COMPILE, contract.TRAIN} if accelerator == "neuron" else set()
    images = {stage: BOTH.image_of(stage, accelerator) for stage in BUILT_IN_DEFAULTS}
    assert images == {stage: NEURON if stage in on_devices else TORCH for stage in BUILT_IN_DEFAULTS}


def test_an_image_for_one_stage_comes_before_that_for_neuron_devices() -> None:
    settings = Settings(trainer_image=TORCH, neuron_image=NEURON, stages={contract.TRAIN: StageDefaults(image=OWN)})
    assert settings.image_of(contract.TRAIN, "neuron") == OWN
    assert settings.image_of(contract.COMPILE, "neuron") == NEURON


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        pytest.param(Settings(trainer_image=TORCH), {contract.COMPILE, contract.TRAIN}, id="one image for all"),
        pytest.param(BOTH, set(), id="an image for Neuron"),
        pytest.param(
            Settings(trainer_image=TORCH, stages={contract.TRAIN: StageDefaults(image=OWN)}),
            {contract.COMPILE},
            id="an image for train alone",
        ),
    ],
)
def test_a_stage_on_neuron_devices_lacks_an_image_where_only_the_one_for_all_is_named(
    settings: Settings, lacking: set[str]
) -> None:
    assert {stage for stage in BUILT_IN_DEFAULTS if settings.lacks_neuron_image(stage)} == lacking
