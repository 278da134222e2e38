"""Names by content: what changes a tag and what must not."""

from pathlib import Path

import pytest
from local_cluster.digests import content_tag
from local_cluster.problem import ClusterProblem


def _tree(root: Path) -> Path:
    (root / "package").mkdir(parents=True)
    (root / "package" / "a.py").write_text("a = 1\n")
    (root / "package" / "b.py").write_text("b = 2\n")
    return root


def test_the_same_contents_in_another_folder_have_the_same_tag(tmp_path: Path) -> None:
    assert content_tag([_tree(tmp_path / "one")]) == content_tag([_tree(tmp_path / "two")])


@pytest.mark.parametrize(
    "scrap",
    [
        pytest.param("package/__pycache__/a.cpython-311.pyc", id="compiled files in their folder do not count"),
        pytest.param("package/a.pyc", id="a compiled file beside its source does not count"),
        pytest.param("x.egg-info/PKG-INFO", id="an editable installation's metadata does not count"),
    ],
)
def test_what_tools_leave_behind_does_not_change_the_tag(tmp_path: Path, scrap: str) -> None:
    tree = _tree(tmp_path / "tree")
    before = content_tag([tree])
    (tree / scrap).parent.mkdir(exist_ok=True)
    (tree / scrap).write_text("scrap")
    assert content_tag([tree]) == before


def test_contents_names_and_salt_each_change_the_tag(tmp_path: Path) -> None:
    tree = _tree(tmp_path / "tree")
    tags = [content_tag([tree]), content_tag([tree], salt="base:1")]
    (tree / "package" / "a.py").write_text("a = 2\n")
    tags.append(content_tag([tree]))
    (tree / "package" / "b.py").rename(tree / "package" / "c.py")
    tags.append(content_tag([tree]))
    assert len(set(tags)) == len(tags)


def test_a_single_file_counts_by_name_and_contents(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    (tmp_path / "Other").write_text("FROM scratch\n")
    assert content_tag([tmp_path / "Dockerfile"]) != content_tag([tmp_path / "Other"])


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterProblem, match="no-such"):
        content_tag([tmp_path / "no-such"])
