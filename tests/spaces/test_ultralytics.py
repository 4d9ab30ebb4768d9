"""Ultralytics' networks behind the Detector protocol; what needs their package skips where it is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from evaluators.export import export_graph
from spaces.apply import apply, rebuild, same_state, save
from spaces.detectors.base import Category, Detector, Labels, postprocess_of
from spaces.detectors.conversion import convert
from spaces.detectors.registry import DETECTORS, licence_of, make_detector
from spaces.detectors.ultralytics_yolo import UltralyticsYolo
from spaces.detectors.weights import load_weights, save_weights
from spaces.errors import InputError
from spaces.recipe import Drop, Prune, Recipe
from spaces.sites import ChannelSite, find_sites
from spaces.slicing import channels_left, part_named, slice_layers
from spaces.testing import DetectorContract, lively_network, noise, outputs_of

INSTALLED = importlib.util.find_spec("ultralytics") is not None
needed = pytest.mark.skipif(
    not INSTALLED, reason="ultralytics is not installed: pip install -e '.[ultralytics]'"
)
SMALLEST = ["yolov8n", "yolo11n", "yolo26n"]
SIZE = (64, 96)


def small(name: str, classes: int = 3) -> UltralyticsYolo:
    detector = make_detector(name, classes, SIZE)
    assert isinstance(detector, UltralyticsYolo)
    return detector


@needed
class TestUltralytics(DetectorContract):
    @pytest.fixture(params=SMALLEST)
    def detector(self, request: pytest.FixtureRequest) -> Detector:
        return small(request.param)


# -- without their package


def test_every_generation_and_scale_has_a_name_and_a_licence() -> None:
    names = [f"{family}{scale}" for family in ("yolov8", "yolo11", "yolo26") for scale in "nsmlx"]
    for name in names:
        detector = make_detector(name, 80)
        assert detector.preprocess.size == (640, 640)
        assert "AGPL-3.0" in (licence_of(name) or "")
    assert {name for name in DETECTORS if licence_of(name)} == set(names)
    assert licence_of("package.module:Class") is None


@pytest.mark.skipif(INSTALLED, reason="ultralytics is installed")
def test_without_the_package_one_line_says_what_to_install() -> None:
    with pytest.raises(InputError, match=r"AGPL-3\.0: pip install -e '\.\[ultralytics\]'"):
        small("yolov8n").build()


@pytest.mark.parametrize(("classes", "size"), [(0, (64, 64)), (3, (64, 72)), (3, (0, 32))])
def test_impossible_detectors_are_refused(classes: int, size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        make_detector("yolo11n", classes, size)


def test_decoded_boxes_by_hand() -> None:
    """One cell of the second level predicts sides in strides of 16 pixels, the others nothing."""
    detector = small("yolov8n", classes=2)
    maps = [torch.zeros(1, 64, 64 // s, 96 // s) for s in (8, 16, 32)]
    scores = [torch.full((1, 2, 64 // s, 96 // s), -10.0) for s in (8, 16, 32)]
    for side, bin_ in enumerate((1, 2, 3, 0)):
        maps[1][0, side * 16 + bin_, 1, 2] = 100.0
    scores[1][0, 1, 1, 2] = 0.0
    boxes, found = detector.decode((*maps, *scores))
    cell = 8 * 12 + 1 * 6 + 2
    # The centre is at (2.5, 1.5) strides.
    torch.testing.assert_close(boxes[0, cell], torch.tensor([24.0, -8.0, 88.0, 24.0]))
    torch.testing.assert_close(found[0, cell], torch.tensor([torch.tensor(-10.0).sigmoid(), 0.5]))
    # Equal chances of 0 to 15 strides have their mean at 7.5.
    torch.testing.assert_close(boxes[0, 0], torch.tensor([4 - 60.0, 4 - 60.0, 4 + 60.0, 4 + 60.0]))


def test_distances_of_the_end_to_end_head_are_taken_as_they_are() -> None:
    detector = small("yolo26n", classes=1)
    maps = [torch.full((1, 4, 64 // s, 96 // s), 0.5) for s in (8, 16, 32)]
    maps[2][0, :, 0, 0] = torch.tensor([-1.0, 0.5, 0.0, 0.5])  # right of left, so there is no box
    scores = [torch.zeros(1, 1, 64 // s, 96 // s) for s in (8, 16, 32)]
    boxes, _ = detector.decode((*maps, *scores))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.0, 0.0, 8.0, 8.0]))
    assert boxes[0, 96 + 24].tolist() == [48.0, 0.0, 48.0, 32.0]


def test_distillation_by_hand() -> None:
    """Everything equal but one class logit, 0 against the teacher's ln 3, that is 3/4: a known divergence."""
    detector = small("yolov8n", classes=1)
    maps = [torch.zeros(1, 64, 64 // s, 96 // s) for s in (8, 16, 32)]
    scores = [torch.full((1, 1, 64 // s, 96 // s), -50.0) for s in (8, 16, 32)]
    wise = [s.clone() for s in scores]
    student = [s.clone() for s in scores]
    wise[0][0, 0, 0, 0], student[0][0, 0, 0, 0] = torch.log(torch.tensor(3.0)), 0.0
    found = detector.distillation((*maps, *student), (*maps, *wise))
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -- with it


@needed
@pytest.mark.parametrize("name", SMALLEST)
def test_outputs_and_state_are_those_of_their_own_model(name: str) -> None:
    """Their model's raw predictions on the same weights, and its names; the second head of 26 is left out."""
    from ultralytics.nn.tasks import DetectionModel

    detector = small(name)
    theirs = DetectionModel(f"{name}.yaml", nc=3, verbose=False).eval()
    network = detector.build().eval()
    state = theirs.state_dict()
    left = {key for key in state if key not in network.state_dict()}
    assert network.state_dict().keys() <= state.keys()
    if name == "yolo26n":
        assert left
        assert all(key.startswith(("model.23.cv2.", "model.23.cv3.")) for key in left)
    else:
        assert not left
    network.load_state_dict({key: value for key, value in state.items() if key not in left})
    images = noise(detector, 2)
    with torch.no_grad():
        served, raw = theirs(images)
    raw = raw.get("one2one", raw)
    outputs = outputs_of(network, images)
    boxes = torch.cat([o.flatten(2) for o in outputs[:3]], dim=2)
    scores = torch.cat([o.flatten(2) for o in outputs[3:]], dim=2)
    torch.testing.assert_close(boxes, raw["boxes"])
    torch.testing.assert_close(scores, raw["scores"])
    ours, ratings = detector.decode(outputs)
    if name != "yolo26n":  # theirs are centre, width, height and then scores, before suppression
        centre, extent = served[:, :2], served[:, 2:4]
        expected = torch.cat((centre - extent / 2, centre + extent / 2), dim=1).transpose(1, 2)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ratings, served[:, 4:].transpose(1, 2))


@needed
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_the_loss_is_theirs(name: str) -> None:
    """That of their model on the same raw predictions, of their one-to-one head where there is one."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    detector = small(name)
    theirs = DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    theirs.args = get_cfg()
    outputs = outputs_of(lively_network(detector), noise(detector, 2))
    labels = [
        Labels(torch.tensor([[8.0, 8.0, 40.0, 56.0], [50.0, 4.0, 90.0, 60.0]]), torch.tensor([0, 2])),
        Labels(torch.tensor([[0.0, 16.0, 64.0, 48.0]]), torch.tensor([1])),
    ]
    raw = {
        "boxes": torch.cat([o.flatten(2) for o in outputs[:3]], dim=2),
        "scores": torch.cat([o.flatten(2) for o in outputs[3:]], dim=2),
        "feats": list(outputs[:3]),
    }
    batch = {
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([0.0, 2.0, 1.0]),
        "bboxes": torch.tensor(  # centre x, y, width, height over the image's 96 x 64
            [[24 / 96, 0.5, 32 / 96, 0.75], [70 / 96, 0.5, 40 / 96, 56 / 64], [32 / 96, 0.5, 64 / 96, 0.5]]
        ),
    }
    criterion = theirs.init_criterion()
    criterion = getattr(criterion, "one2one", criterion)
    assigner, masses = criterion.assigner, []

    def assigned(*arguments: object, **options: object) -> object:
        result = assigner(*arguments, **options)
        masses.append(result[2].sum())
        return result

    criterion.assigner = assigned
    expected, _ = criterion(raw, batch)
    (mass,) = masses
    # Theirs is over the sum of the target scores, at least 1; ours over that and at least 1 for each image.
    wanted = expected.sum() / 2 * mass.clamp(min=1) / mass.clamp(min=2)
    torch.testing.assert_close(detector.loss(outputs, labels), wanted)


@needed
@pytest.mark.parametrize("name", SMALLEST)
def test_a_network_learns_two_images(name: str) -> None:
    detector = small(name)
    torch.manual_seed(0)
    network = detector.build()
    images = noise(detector, 2)
    labels = [
        Labels(torch.tensor([[8.0, 8.0, 40.0, 56.0]]), torch.tensor([0])),
        Labels(torch.tensor([[30.0, 4.0, 90.0, 60.0]]), torch.tensor([2])),
    ]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = detector.loss(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def zeroed(network: nn.Module, site: ChannelSite, kept: Tensor) -> None:
    """Silence the channels of a site: what produces or scales them gives 0 there, and SiLU keeps that."""
    alive = set(kept.tolist())
    for member in site.members:
        gone = [c for c, root in zip(member.channels, member.roots, strict=True) if root not in alive]
        part = part_named(network, member.layer)
        if member.side == "out" and isinstance(part, nn.Module):
            with torch.no_grad():
                part.weight[gone] = 0  # type: ignore[operator, index]
                if part.bias is not None:
                    part.bias[gone] = 0  # type: ignore[operator, index]


@needed
@pytest.mark.parametrize("name", SMALLEST)
def test_channels_taken_away_are_those_that_were_silent(name: str) -> None:
    """A site cuts the right channels: the cut network computes what the whole one does with them at 0."""
    detector = small(name)
    network, images = lively_network(detector), noise(detector, 1)
    sites = find_sites(detector, network).channel
    generator = torch.Generator().manual_seed(1)
    kept = {
        name: torch.randperm(site.channels, generator=generator)[: (site.channels + 1) // 2].sort().values
        for name, site in sites.items()
    }
    silent, cut = lively_network(detector), lively_network(detector)
    for key, site in sites.items():
        zeroed(silent, site, kept[key])
    slice_layers(cut, channels_left(cut, sites, kept))
    for ours, plain in zip(outputs_of(cut, images), outputs_of(silent, images), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


@needed
@pytest.mark.parametrize("name", SMALLEST)
def test_most_of_the_network_can_lose_channels(name: str) -> None:
    """Halves of split blocks, too; attention, whose heads have fixed sizes, is left alone."""
    detector = small(name)
    network = detector.build()
    sites = find_sites(detector, network)
    touched = {m.layer for site in sites.channel.values() for m in site.members if m.layer in sites.facts}
    assert "model.2.cv1.conv" in touched
    assert not any(".qkv." in layer or ".pe." in layer for layer in touched if layer.endswith("out"))
    whole = sum(f.macs(f.inputs, f.outputs) for f in sites.facts.values())
    half = sites.widths({key: (site.channels + 1) // 2 for key, site in sites.channel.items()})
    left = sum(f.macs(*half[key]) for key, f in sites.facts.items())
    assert left < 0.4 * whole


@needed
@pytest.mark.parametrize("name", SMALLEST)
def test_pruned_weights_and_dropped_blocks_are_stored_and_made_again(name: str, tmp_path: Path) -> None:
    detector = small(name)
    network, images = lively_network(detector), noise(detector, 1)
    sites = find_sites(detector, network)
    blocks = tuple(Drop(site=site) for site in sites.residual)
    assert blocks
    prunes = tuple(Prune(site=site, sparsity=0.5) for site in sites.channel)
    recipe = Recipe(detector=name, choices=(*prunes, *blocks))
    draft = apply(network, recipe, sites)
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(detector.build(), tmp_path)
    assert again == recipe
    assert same_state(draft.network.state_dict(), rebuilt.network.state_dict())
    for one, other in zip(
        outputs_of(draft.network.eval(), images), outputs_of(rebuilt.network.eval(), images), strict=True
    ):
        assert torch.equal(one, other)


@needed
def test_the_end_to_end_head_is_exported_without_suppression() -> None:
    detector = small("yolo26n")
    categories = [Category(id=k, name=str(k)) for k in range(3)]
    graph = export_graph(lively_network(detector), detector, postprocess_of(detector), categories)
    assert not any(node.op_type == "NonMaxSuppression" for node in graph.graph.node)
    onnx.checker.check_model(graph)


@needed
def test_building_and_importing_leave_the_process_as_it_was() -> None:
    """No variable of the environment, no activation that other networks share."""
    code = """
import os, sys
from spaces.detectors.registry import make_detector
os.environ.pop("OMP_NUM_THREADS", None)
before = dict(os.environ)
network = make_detector("yolov8n", 3, (64, 64)).build()
from ultralytics.nn.modules import Conv
assert all(m is not Conv.default_act for m in network.modules())
sys.exit(dict(os.environ) != before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0


@needed
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n"])
def test_their_files_are_converted_and_loaded(name: str, tmp_path: Path) -> None:
    """A checkpoint as their trainer writes it: a whole network, in half precision, with its settings."""
    from ultralytics.nn.tasks import DetectionModel

    theirs = DetectionModel(f"{name}.yaml", nc=5, verbose=False)
    torch.save(
        {"epoch": -1, "model": None, "ema": theirs.half(), "train_args": {"model": name}},
        tmp_path / "best.pt",
    )
    with pytest.raises(InputError, match="--trust"):
        convert(tmp_path / "best.pt", tmp_path / "best.safetensors")
    convert(tmp_path / "best.pt", tmp_path / "best.safetensors", trust=True)
    network = small(name, classes=5).build()
    load_weights(network, tmp_path / "best.safetensors")
    state = theirs.float().state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    with pytest.raises(InputError, match="has 5 classes, the data set has 80"):
        load_weights(small(name, classes=80).build(), tmp_path / "best.safetensors")
    with pytest.raises(InputError, match="made for another model"):
        load_weights(make_detector("yolo11s", 5, SIZE).build(), tmp_path / "best.safetensors")
    save_weights(network, tmp_path / "ours.safetensors")
    load_weights(small(name, classes=5).build(), tmp_path / "ours.safetensors")
