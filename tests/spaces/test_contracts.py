"""The shipped contracts, on the detectors and methods that are shipped."""

import pytest

from spaces.detectors.base import Detector
from spaces.detectors.registry import make_detector
from spaces.detectors.yolox import YoloX
from spaces.methods.base import Method
from spaces.methods.registry import METHODS
from spaces.methods.testing import MethodContract
from spaces.testing import DetectorContract


class TestYoloX(DetectorContract):
    @pytest.fixture(params=["yolox_digits", "yolox_nano"])
    def detector(self, request: pytest.FixtureRequest) -> Detector:
        return make_detector(request.param, 3, size=(64, 96))


class TestMethods(MethodContract):
    # At this size there is no smaller one, a single stage proposes nothing, 21 boxes are few already, nothing
    # gates: these have tests of their own.
    @pytest.fixture(params=sorted(set(METHODS) - {"resize", "proposals", "topk", "gate"}))
    def method(self, request: pytest.FixtureRequest) -> Method:
        return METHODS[request.param]

    @pytest.fixture
    def detector(self) -> Detector:
        return YoloX("narrow", 3, (32, 32), depth=0.33, width=0.125, depthwise=True)
