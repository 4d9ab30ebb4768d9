"""The shipped contract, on every target that is shipped."""

import pytest

from evaluators.targets.base import Target
from evaluators.targets.registry import TARGETS, target_named
from evaluators.testing import TargetContract
from spaces.errors import InputError


class TestTargets(TargetContract):
    @pytest.fixture(params=sorted(TARGETS))
    def target(self, request: pytest.FixtureRequest) -> Target:
        target = TARGETS[request.param]
        try:
            assert target.capabilities.bit_widths
        except InputError as error:
            pytest.skip(str(error))
        return target


def test_targets_by_name() -> None:
    assert all(target_named(name).name == name for name in TARGETS)
    with pytest.raises(InputError, match="'tpu': choose one of openvino, onnxruntime"):
        target_named("tpu")
