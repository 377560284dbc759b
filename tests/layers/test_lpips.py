"""Our LPIPS against the ``lpips`` package with equal (random) weights."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from l3m_like.core.errors import UserError
from l3m_like.layers import LPIPS
from l3m_like.layers.lpips import SCALE, SHIFT
from l3m_like.pretrained import NameMap, import_state
from l3m_like.pretrained.lpips import lpips_names
from tests.parity.rule import check_values

SIDES = {"vgg": 24, "alex": 67}


def reference_of(net: str) -> nn.Module:
    from l3m_like.core.torchvision_ops import allow_torchvision

    allow_torchvision()
    import lpips
    from torchvision.models.alexnet import AlexNet
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    # the classifiers are not part of the distance, and take seconds to draw
    with mock.patch.object(nn, "Linear", lambda *size: nn.Identity()):
        features = make_layers(cfgs["D"]) if net == "vgg" else AlexNet().features
    with mock.patch.multiple(
        "lpips.pretrained_networks.tv",
        vgg16=lambda **_: SimpleNamespace(features=features),
        alexnet=lambda **_: SimpleNamespace(features=features),
    ):
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).double()
    theirs.scaling_layer.shift, theirs.scaling_layer.scale = (  # which it rounds to float32
        torch.tensor(numbers, dtype=torch.float64).view(1, 3, 1, 1) for numbers in (SHIFT, SCALE)
    )
    return theirs


def ours_of(net: str, theirs: nn.Module) -> LPIPS:
    ours = LPIPS(net).double()
    ours.load_state_dict(import_state(NameMap.of(lpips_names(net), ours), theirs.state_dict()))
    return ours


def images(net: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, SIDES[net], SIDES[net], generator=generator, dtype=torch.float64) * 2 - 1
    return first, (first + 0.3 * torch.randn(first.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_the_package(net: str) -> None:
    theirs, (x, y) = reference_of(net), images(net)
    ours = ours_of(net, theirs)
    leaves = [y.clone().requires_grad_(), y.clone().requires_grad_()]
    distances = ours(x, leaves[0]), theirs(x, leaves[1]).flatten()
    assert distances[0].shape == (2,) and bool((distances[1] > 1e-4).all())
    check_values(distances[0].detach(), distances[1].detach())
    for distance in distances:
        distance.sum().backward()
    check_values(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]


def test_a_planted_fault_is_found() -> None:
    theirs, (x, y) = reference_of("alex"), images("alex")
    ours = ours_of("alex", theirs)
    ours.weights[3].weight.data *= 1.0001
    with pytest.raises(AssertionError):
        check_values(ours(x, y).detach(), theirs(x, y).flatten().detach())


def test_distance_of_equal_images() -> None:
    """Zero, with a finite slope, also where all features vanish."""
    net = LPIPS("alex", smallest=63)
    for parameter in net.parameters():
        nn.init.constant_(parameter, -0.1)  # ReLU leaves nothing
    x = torch.rand(2, 1, 28, 28)
    y = x.clone().requires_grad_()
    distance = net(x, y)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2)) and y.grad is not None and bool(y.grad.isfinite().all())


def test_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(UserError, match="Did you mean 'alex'"):
        LPIPS("alexnet")
    with pytest.raises(UserError, match="two equal"):
        LPIPS("alex")(torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64, 64))
