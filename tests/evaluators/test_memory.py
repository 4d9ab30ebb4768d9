import subprocess
import sys

import pytest

from evaluators.memory import peak_memory_mb


def test_measuring_memory_loads_no_torch():
    """It is a process of its own in every trial: torch took more of its time than the model."""
    code = "import sys, evaluators.memory; print({'torch', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_model_that_cannot_be_loaded_is_said_so(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"measuring memory: .*model\.onnx"):
        peak_memory_mb(file, "openvino", 1, "f32", (32, 32))
