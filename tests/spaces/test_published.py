"""Weights by name: found in torch's cache, downloaded, or refused in one line."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from spaces.detectors import published
from spaces.detectors.published import weights_file
from spaces.errors import InputError

SSDLITE = "ssdlite320_mobilenet_v3_large"
FILE = "ssdlite320_mobilenet_v3_large_coco-a79551df.pth"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path) -> Iterator[Path]:
    """A cache of this test alone."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def unreachable(*call: object, **options: object) -> None:
    raise URLError("Name or service not known")


def test_files_and_other_names_stay_as_they_are(tmp_path: Path) -> None:
    for given in (tmp_path / "w.pth", Path("runs/Best.pth"), Path("weights.safetensors")):
        assert weights_file(SSDLITE, given) == given
    (tmp_path / "COCO_V1").write_bytes(b"")
    assert weights_file(SSDLITE, tmp_path / "COCO_V1") == tmp_path / "COCO_V1"


def test_a_downloaded_file_needs_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "urlopen", unreachable)
    hub.mkdir(parents=True)
    (hub / FILE).write_bytes(b"")
    assert weights_file(SSDLITE, Path("COCO_V1")) == hub / FILE
    assert weights_file(SSDLITE, Path("DEFAULT")) == hub / FILE


def test_without_network_it_says_what_to_do(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "urlopen", unreachable)
    with pytest.raises(InputError) as caught:
        weights_file(SSDLITE, Path("COCO_V1"))
    said = str(caught.value)
    assert "Name or service not known" in said
    assert f"https://download.pytorch.org/models/{FILE}" in said
    assert "\n" not in said
    assert not hub.exists()


class Answer(io.BytesIO):
    def info(self) -> Message:
        return Message()


@pytest.mark.parametrize("right", [True, False])
def test_what_arrives_is_checked(right: bool, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"weights"
    digest = hashlib.sha256(content if right else b"others").hexdigest()[:8]
    monkeypatch.setattr(published, "_address", lambda *call: f"https://there/model-{digest}.pth")

    def answer(*call: Any, **options: Any) -> Answer:
        return Answer(content)

    monkeypatch.setattr(published, "urlopen", answer)
    monkeypatch.setattr(torch.hub, "urlopen", answer)
    if right:
        assert weights_file(SSDLITE, Path("COCO_V1")).read_bytes() == content
    else:
        with pytest.raises(InputError, match="invalid hash"):
            weights_file(SSDLITE, Path("COCO_V1"))
        assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        ("yolox_nano", "COCO_V1", "publishes none for yolox_nano"),
        ("retinanet_resnet18_fpn", "DEFAULT", "publishes none for retinanet_resnet18_fpn"),
        (SSDLITE, "COCO_V2", "publishes for ssdlite320_mobilenet_v3_large: COCO_V1"),
    ],
)
def test_names_that_are_not_published_are_refused(model: str, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        weights_file(model, Path(name))
