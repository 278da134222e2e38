"""What KWOK is started with: fake nodes and nothing else, with the caller's stages."""

import json
from pathlib import Path

import pytest
from local_cluster import kwok
from local_cluster.cli import main
from local_cluster.kubectl import documents
from local_cluster.parts import kwok_part
from local_cluster.problem import ClusterProblem
from local_cluster.settings import Settings

SETTINGS = Settings(cache=Path("/c"), state=Path("/s"), run=Path("/r"), source=Path("/tree/hack/cluster"))


def test_only_nodes_that_say_they_are_fake_are_played() -> None:
    options = json.loads(kwok.configuration(SETTINGS))["options"]
    assert options["manageAllNodes"] is False
    assert options["manageNodesWithAnnotationSelector"] == "kwok.x-k8s.io/node=fake"
    assert kwok.fake_node(0)["metadata"]["annotations"] == {"kwok.x-k8s.io/node": "fake"}


def test_a_fake_node_refuses_pods_that_do_not_ask_for_one() -> None:
    taints = kwok.fake_node(3)["spec"]["taints"]
    assert taints == [{"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}]
    assert kwok.fake_node(3)["metadata"]["name"] != kwok.fake_node(4)["metadata"]["name"]


def test_kwok_reads_its_own_configuration_then_the_callers_stages() -> None:
    stages = [Path("/s/a.yaml"), Path("/s/b.yaml")]
    part = kwok_part(SETTINGS, Path("/bin/kwok"), stages)
    own = SETTINGS.config / "kwok.json"
    assert part.argv[1:4] == (f"--config={own}", "--config=/s/a.yaml", "--config=/s/b.yaml")
    assert part.files == (own, *stages)


def test_kwok_does_not_read_the_configuration_of_who_starts_it() -> None:
    assert kwok_part(SETTINGS, Path("/bin/kwok"), []).env["HOME"] == str(SETTINGS.config)


def test_a_missing_stage_file_is_named_before_anything_is_started(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ClusterProblem, match=r"no-such-stage\.yaml"):
        kwok.start(settings, [tmp_path / "no-such-stage.yaml"], 0)
    assert not settings.config.exists()


def test_an_add_on_needs_an_action(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["kwok"])
    assert "ACTION" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param('{"kind": "A"}\n{"kind": "B"}\n', ["A", "B"], id="one after the other"),
        pytest.param('{"kind": "List", "items": [{"kind": "A"}]}{"kind": "B"}', ["A", "B"], id="a list and one more"),
    ],
)
def test_kubectls_json_is_read_object_by_object(text: str, names: list[str]) -> None:
    assert [item["kind"] for item in documents(text)] == names
