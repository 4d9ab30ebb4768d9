"""The contract test of compression methods, which ships with the package; used as `spaces.testing`'s is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector
from spaces.errors import InputError
from spaces.methods.base import Draft, Method
from spaces.recipe import Choice, is_identity
from spaces.sites import Sites, find_sites
from spaces.testing import lively_network, noise, outputs_of

EVERYTHING = Capabilities(bit_widths=(32, 16, 8), channel_granule=8, fuses_elementwise=True)


class MethodContract:
    """Override the fixtures `method` and, for other layers than a small YOLOX has, `detector`."""

    capabilities = EVERYTHING
    same_shapes = True
    """False for a method that changes how many boxes a network has raw outputs for."""

    @pytest.fixture
    def method(self) -> Method:
        """The method under test."""
        raise NotImplementedError("override the fixture `method`")

    @pytest.fixture
    def detector(self) -> Detector:
        """The detector to try it on, at a small input size."""
        raise NotImplementedError("override the fixture `detector`")

    @pytest.fixture
    def network(self, detector: Detector) -> nn.Module:
        """A base network of that detector."""
        return lively_network(detector)

    @pytest.fixture
    def sites(self, detector: Detector, network: nn.Module) -> Sites:
        """Its sites."""
        return find_sites(detector, network)

    @pytest.fixture
    def options(self, method: Method, sites: Sites) -> dict[str, tuple[Choice, ...]]:
        """What the method offers there."""
        return method.options(sites, self.capabilities)

    def test_options_are_of_its_kind_and_the_first_changes_nothing(
        self, method: Method, sites: Sites, options: dict[str, tuple[Choice, ...]]
    ) -> None:
        assert isinstance(method, Method)
        assert any(len(choices) > 1 for choices in options.values())
        for site, choices in options.items():
            assert all((choice.kind, choice.site) == (method.kind, site) for choice in choices)
            assert [is_identity(choice) for choice in choices] == [k == 0 for k in range(len(choices))]
            assert len(set(choices)) == len(choices)
            for choice in choices:
                method.check(choice, sites)

    def test_identity_leaves_outputs_bit_equal(
        self,
        method: Method,
        detector: Detector,
        network: nn.Module,
        sites: Sites,
        options: dict[str, tuple[Choice, ...]],
    ) -> None:
        draft, images = Draft(copy.deepcopy(network)), noise(detector, 1)
        method.apply(draft, [choices[0] for choices in options.values()], sites, {})
        for ours, plain in zip(outputs_of(draft.network, images), outputs_of(network, images), strict=True):
            assert torch.equal(ours, plain)

    def test_every_option_can_be_carried_out(
        self,
        method: Method,
        detector: Detector,
        network: nn.Module,
        sites: Sites,
        options: dict[str, tuple[Choice, ...]],
    ) -> None:
        """The k-th options of all sites together, then the strongest one alone at a dozen of the sites."""
        images = noise(detector, 1)
        whole = [o.shape for o in outputs_of(network, images)]
        most = max(len(choices) for choices in options.values())
        together = [[c[min(k, len(c) - 1)] for c in options.values()] for k in range(1, most)]
        alone = [[choices[-1]] for choices in options.values() if len(choices) > 1]
        for chosen in together + alone[:: 1 + len(alone) // 12]:
            draft = Draft(copy.deepcopy(network))
            method.apply(draft, chosen, sites, {})
            outputs = outputs_of(draft.network, images)
            if self.same_shapes:
                assert [o.shape for o in outputs] == whole
            else:
                boxes, scores = detector.decode(outputs)
                assert boxes.shape[:2] == scores.shape[:2]
                assert scores.shape[::2] == (1, detector.num_classes)
            assert all(bool(torch.isfinite(o).all()) for o in outputs)

    def test_unknown_sites_are_refused_in_one_line(
        self, method: Method, sites: Sites, options: dict[str, tuple[Choice, ...]]
    ) -> None:
        elsewhere = next(iter(options.values()))[-1].model_copy(update={"site": "no.such.site"})
        with pytest.raises(InputError, match=r"no\.such\.site") as caught:
            method.check(elsewhere, sites)
        assert "\n" not in str(caught.value)
