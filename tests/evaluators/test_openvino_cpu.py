"""OpenVINO in a process that has more than one model."""

import subprocess
import sys
from pathlib import Path

from evaluators.targets.registry import TARGETS
from evaluators.testing import loaded

OVERLAPPING = """
import faulthandler, os, signal, sys
from pathlib import Path
from evaluators.targets.registry import TARGETS
faulthandler.enable()  # signals come on a stack of their own, as under pytest and in Ray's workers
file, target = Path(sys.argv[1]), TARGETS["openvino"]
first = target.prepare(file, 1)
second = target.prepare(file, 1)
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("still here"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_sessions_ended_in_the_order_they_began(tmp_path: Path) -> None:
    """On a CPU with AMX this ended in a segmentation fault while each session had an OpenVINO of its own."""
    loaded(TARGETS["openvino"], 32, tmp_path)
    command = [sys.executable, "-c", OVERLAPPING, str(tmp_path / "model.onnx")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "still here\n"), ended.stderr
