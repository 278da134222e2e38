"""Image archives, which images are collected, and what a build is told."""

import json
import tarfile
from pathlib import Path

import pytest
from local_cluster import image_build, images, oci

TRAINER = "localhost/finetune-trainer"


def test_an_archive_is_an_oci_layout_whose_digests_fit(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(b"\x7fELF")
    oci.write_single_file_layer(tmp_path / "layer", program)
    oci.write_archive(tmp_path / "a.tar", tmp_path / "layer", "localhost/p:1", "amd64", oci.ImageConfig(("/pause",)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        read = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    described = json.loads(read["index.json"])["manifests"][0]
    assert described["annotations"] == {"io.containerd.image.name": "localhost/p:1"}
    manifest = json.loads(read["blobs/" + described["digest"].replace(":", "/")])
    config = json.loads(read["blobs/" + manifest["config"]["digest"].replace(":", "/")])
    assert config["config"]["Entrypoint"] == ["/pause"]
    assert config["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]]
    assert len(read["blobs/" + manifest["layers"][0]["digest"].replace(":", "/")]) == manifest["layers"][0]["size"]


@pytest.mark.parametrize(
    ("present", "requests", "kept", "keep", "gone"),
    [
        pytest.param(
            [f"{TRAINER}:a", f"{TRAINER}:b"], {f"{TRAINER}:a": 1.0, f"{TRAINER}:b": 2.0}, set(), 1, [f"{TRAINER}:a"],
            id="the tag asked for last stays",
        ),
        pytest.param(
            [f"{TRAINER}:a", f"{TRAINER}:b"], {f"{TRAINER}:b": 2.0}, {f"{TRAINER}:a"}, 1, [],
            id="an image that a container uses stays",
        ),
        pytest.param(
            ["docker.io/library/nginx:1", "docker.io/library/nginx:2"], {}, set(), 1, [],
            id="images that are not ours stay",
        ),
        pytest.param(
            [f"{TRAINER}:a", f"{TRAINER}:b"], {f"{TRAINER}:a": 1.0}, set(), 2, [], id="as many stay as are to be kept"
        ),
    ],
)  # fmt: skip
def test_superseded_images(
    present: list[str], requests: dict[str, float], kept: set[str], keep: int, gone: list[str]
) -> None:
    assert images.superseded(present, requests, kept, keep) == gone


@pytest.mark.parametrize(
    ("environ", "configs", "expected"),
    [
        pytest.param({}, [], {}, id="a host with no settings passes none"),
        pytest.param(
            {"PIP_INDEX_URL": "https://a.example/simple", "PIP_CERT": "/x"}, [],
            {"PIP_INDEX_URL": "https://a.example/simple"}, id="variables of the host are passed",
        ),
        pytest.param(
            {}, ["[global]\nindex-url = https://b.example/simple\ncert = /x\n"],
            {"PIP_INDEX_URL": "https://b.example/simple"}, id="pip's configuration is read",
        ),
        pytest.param(
            {"PIP_INDEX_URL": "https://a.example"}, ["[global]\nindex-url = https://b.example\n"],
            {"PIP_INDEX_URL": "https://a.example"}, id="a variable wins over the configuration",
        ),
    ],
)  # fmt: skip
def test_index_settings_of_the_host(environ: dict[str, str], configs: list[str], expected: dict[str, str]) -> None:
    assert image_build.index_settings(environ, configs) == expected


def test_secrets_are_passed_by_name_and_never_by_value() -> None:
    build = image_build.Build(
        TRAINER, "1", Path("/t/Dockerfile"), Path("/t"), ("BASE_IMAGE=b:1",), secrets=("PIP_INDEX_URL",)
    )
    environ = {"PIP_INDEX_URL": "https://user:password@a.example", "HTTPS_PROXY": "http://proxy.example"}
    argv = image_build.command(build, Path("/bin/buildctl"), Path("/r/b.sock"), Path("/ca.crt"), environ)
    assert not any("password" in argument for argument in argv)
    assert "id=PIP_INDEX_URL,env=PIP_INDEX_URL" in argv
    assert "id=ca,src=/ca.crt" in argv
    assert "build-arg:BASE_IMAGE=b:1" in argv
    assert "build-arg:HTTPS_PROXY=http://proxy.example" in argv
    assert argv[-1].startswith(f"type=image,name={TRAINER}:1,")


def test_the_base_images_name_is_known_before_it_is_made() -> None:
    assert images.base_reference() == images.base_reference()
    assert images.base_reference().startswith("localhost/finetune-base:")
