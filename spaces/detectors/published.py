"""Weights that torchvision publishes, by their names, such as `COCO_V1`."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from torchvision.models import get_model_weights

from spaces.errors import InputError

_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|DEFAULT")
_HASH = re.compile(r"-([0-9a-f]{8,})\.\w+$")
_PATIENCE = 20.0  # seconds until a server must have answered


def weights_file(model: str, given: Path) -> Path:
    """The file of a model's weights: `given`, or the one that torchvision publishes under that name.

    A published file is downloaded once, into torch's own cache (`TORCH_HOME`), and its digest is checked.
    Nothing of it is run; `spaces.detectors.weights` reads it like any file.

    Args:
        model: name of the detector.
        given: a path, or a name such as `COCO_V1`. A file of that name wins.

    Raises:
        InputError: there are no such weights for this model, or they cannot be downloaded.
    """
    name = given.name
    if not _NAME.fullmatch(name) or given.exists():
        return given
    url = _address(model, name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        digest = _HASH.search(url)
        try:
            urlopen(Request(url, method="HEAD"), timeout=_PATIENCE).close()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), digest.group(1) if digest else None, progress=True)
        except (URLError, OSError, RuntimeError) as error:
            cause = " ".join(str(getattr(error, "reason", error)).split())
            remedy = f"cannot be downloaded ({cause}); get {url} elsewhere and name the file"
            raise InputError("checkpoint", name, remedy) from None
    return file


def _address(model: str, name: str) -> str:
    try:
        offered = get_model_weights(model.removesuffix("_stretch"))
    except ValueError:
        raise InputError("checkpoint", name, f"torchvision publishes none for {model}; name a file") from None
    if name not in offered.__members__:
        known = ", ".join(offered.__members__) or "none"
        raise InputError("checkpoint", name, f"torchvision publishes for {model}: {known}")
    return str(offered[name].url)
