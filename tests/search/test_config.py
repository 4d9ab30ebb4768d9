"""Configurations: what may be written, what the command line changes, what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from search.config import SearchConfig, load_config, parse_config, read_limits
from spaces.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "configs"
LEAST = {"model": "yolox_nano", "checkpoint": "base.pth", "data": {"root": "images"}}


def write(folder: Path, document: Any, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def test_a_short_configuration_is_named_after_its_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LEAST))
    assert config.name == "mine"
    assert config.problem.objectives == ("map", "latency_ms")
    assert config.search.trials == 40
    assert config.bench.model == "yolox_nano"
    assert not hasattr(config.bench, "keep_mb")


def test_paths_are_looked_for_beside_the_file_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    (there / "base.pth").touch()
    config = load_config(write(there, LEAST))
    assert config.checkpoint == there / "base.pth"
    assert config.data.root == here / "images"
    assert config.cache == here / "runs" / "cache"


def test_a_folder_called_like_annotations_does_not_take_their_place(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    config = load_config(write(tmp_path, {**LEAST, "data": {"root": "images", "fit": "train"}}))
    assert config.data.fit == "train"


def test_weights_by_name_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's cache, where this file is put that nobody reads here."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "ssdlite320_mobilenet_v3_large_coco-a79551df.pth"
    file.parent.mkdir()
    file.touch()
    plain = {"model": "ssdlite320_mobilenet_v3_large", "data": {"root": "images"}}
    for field in ("weights", "checkpoint"):
        config = load_config(write(tmp_path, {**plain, field: "COCO_V1"}))
        assert config.checkpoint == file
        assert load_config(write(tmp_path, {**plain, field: "COCO_V1"}), {"checkpoint": "w.pth"}) != config
    assert load_config(write(tmp_path, plain), {"checkpoint": "COCO_V1"}).checkpoint == file


def test_the_command_line_wins(tmp_path: Path) -> None:
    document = {**LEAST, "search": {"trials": 5, "workers": 3}, "problem": {"limits": {"max_map_drop": 2.0}}}
    changes = {
        "search.trials": 7,
        "search.workers": None,
        "finetune.epochs": 9,
        "data.root": "/elsewhere",
        "problem.limits.map_drop": ["<=", 1.0],
        **read_limits(["size_mb <= 2.5", "map>=30"]),
    }
    config = load_config(write(tmp_path, document), changes)
    assert (config.search.trials, config.search.workers, config.finetune.epochs) == (7, 3, 9)
    assert config.data.root == Path("/elsewhere")
    assert config.problem.limits == {"map": (">=", 30.0), "map_drop": ("<=", 1.0), "size_mb": ("<=", 2.5)}


def test_what_a_study_keeps_makes_the_same_configuration(tmp_path: Path) -> None:
    document = {**LEAST, "size": [320, 416], "problem": {"limits": {"max_size_mb": 2}}}
    config = load_config(write(tmp_path, document))
    assert parse_config(config.model_dump(mode="json"), "study") == config


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations_of_the_project_are_read(file: Path) -> None:
    config = load_config(file, {"checkpoint": "given.pth"})
    assert isinstance(config, SearchConfig)
    assert config.name == file.stem


@pytest.mark.parametrize(
    ("document", "field", "remedy"),
    [
        ({**LEAST, "modell": 1}, "modell", "no such field; there are: model, checkpoint"),
        ({**LEAST, "search": {"trails": 1}}, "search.trails", "trials, workers, sampler, seeds"),
        ({**LEAST, "search": {"trials": 0}}, "search.trials", "greater than or equal to 1"),
        ({**LEAST, "search": {"trials": "many"}}, "search.trials", "valid integer"),
        ({**LEAST, "finetune": {"learning_rate": -1}}, "finetune.learning_rate", "greater than 0"),
        ({**LEAST, "problem": {"objectives": ["map", "beauty"]}}, ": problem.objectives", "choose from map"),
        ({**LEAST, "problem": {"objectives": ["map"]}}, ": problem.objectives", "at least two"),
        (
            {**LEAST, "problem": {"limits": {"max_beauty": 1}}},
            ": problem.limits.max_beauty",
            "limit one of map",
        ),
        (
            {**LEAST, "finetune": {"epochs": 0}, "problem": {"objectives": ["map", "train_step_ms"]}},
            "problem",
            "needs finetune.epochs of at least 1",
        ),
        ({**LEAST, "problem": {"limits": {"max_map_drop": -1}}}, "max_map_drop", "write 0 or more"),
        ({**LEAST, "latency": {"max_rounds": 10}}, ": latency.max_rounds", "below min_rounds, 32"),
        ({**LEAST, "data": {"root": "x", "format": "voc"}}, "data.format", "'yolo'"),
        ({**LEAST, "search": {"rungs": [0, 1.0]}}, "search.rungs", "below 1"),
        ({**LEAST, "search": {"keep": 0}}, "search.keep", "greater than 0"),
        ({**LEAST, "search": {"rungs": []}}, "search.rungs", "shares of the epochs"),
        ({"checkpoint": "x", "data": {"root": "x"}}, "model", "is missing"),
        ({"model": "x", "data": {"root": "x"}}, "checkpoint", "--checkpoint"),
        ({**LEAST, "weights": "COCO_V1"}, "weights", "there is a checkpoint, too"),
        ({**LEAST, "checkpoint": "COCO_V1"}, "checkpoint", "publishes none for yolox_nano"),
        ("- a\n- b\n", "config", "must hold fields"),
        ("a: [1, 2\nb: 3\n", "config", "is no YAML (line 2)"),
        ("? [a, b]\n: c\n", "config", "is no YAML (line 1)"),
        ("model: a\nspace: {methods: [a, a]}\nmodel: b\n", "config", "(line 3): model is there twice"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path: Path, document: Any, field: str, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, document))
    assert field in caught.value.field
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "epochs", "rungs"),
    [
        (None, 0, ()),
        (None, 1, ()),
        (None, 2, (0, 1)),
        (None, 3, (0, 1)),
        (True, 8, (0, 3)),
        (True, 1, (0,)),
        (False, 8, ()),
        ([0.25, 0.5, 0.9], 8, (2, 4, 7)),
        ([0.9], 2, (1,)),  # never after the last epoch
    ],
)
def test_rungs_by_epochs(tmp_path: Path, asked: Any, epochs: int, rungs: tuple[int, ...]) -> None:
    document = {**LEAST, "search": {"rungs": asked}, "finetune": {"epochs": epochs}}
    assert load_config(write(tmp_path, document)).rungs == rungs


def test_rungs_of_no_training_are_refused(tmp_path: Path) -> None:
    document = {**LEAST, "search": {"rungs": True}, "finetune": {"epochs": 0}}
    with pytest.raises(InputError, match=r"finetune\.epochs of at least 1"):
        _ = load_config(write(tmp_path, document)).rungs


@pytest.mark.parametrize("text", ["size_mb", "size_mb=2", "size_mb<=two", "<=3", "size_mb<=1.2.3"])
def test_a_limit_must_be_written_as_one(text: str) -> None:
    with pytest.raises(InputError, match="latency_ms already has a limit"):
        read_limits(["latency_ms>=2", "latency_ms<=8"])
    with pytest.raises(InputError, match=r"latency_ms<=8"):
        read_limits([text])
    with pytest.raises(InputError, match=r"--limit: 'beauty<=2': choose a figure: map, "):
        read_limits(["beauty<=2"])


def test_a_limit_may_say_max_or_min_where_it_means_it() -> None:
    limits = read_limits(["max_latency_ms<=8", "min_map >= 30"])
    assert limits == {"problem.limits.latency_ms": ["<=", 8.0], "problem.limits.map": [">=", 30.0]}
    for text in ("max_latency_ms>=8", "min_map<=30"):
        with pytest.raises(InputError, match="contradicts itself"):
            read_limits([text])
