"""The contract of detectors, on Faster R-CNN."""

import pytest

from spaces.detectors.base import Detector
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_variants import DIGITS
from spaces.testing import DetectorContract


class TestFasterRCNN(DetectorContract):
    @pytest.fixture
    def detector(self) -> Detector:
        return FasterRCNN("small", 3, (64, 64), DIGITS)  # the published ones take five times as long
