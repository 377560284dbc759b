"""Weight names of LPIPS: the state of the ``lpips`` package, which holds the feature network and the channels' weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from l3m_like.core.errors import UserError
from l3m_like.layers.lpips import LPIPS, NETWORKS
from l3m_like.pretrained.families import Family
from l3m_like.pretrained.name_map import Source, Templates

#: where torchvision's ``features`` have their convolutions, stage by stage
_PLACES = {
    "vgg": ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    "alex": ((0,), (3,), (6,), (8,), (10,)),
}


def lpips_names(net: str) -> Templates:
    """Names in ``lpips.LPIPS(net=net).state_dict()`` (its ``scaling_layer`` holds constants)."""
    names: dict[str, str | Source] = {}
    for stage, places in enumerate(_PLACES[net]):
        for number, place in enumerate(places):
            names[f"stages.{stage}.{number}.{{leaf}}"] = f"net.slice{stage + 1}.{place}.{{leaf}}"
        width = NETWORKS[net][stage].widths[-1]
        names[f"weights.{stage}.weight"] = Source(
            f"lin{stage}.model.1.weight", shape=(-1, width, 1, 1), copies=(f"lins.{stage}.model.1.weight",)
        )
    return names


def _family(net: str) -> Family:
    def describe(model: nn.Module) -> dict[str, Any]:
        found = [module.net for module in model.modules() if isinstance(module, LPIPS)]
        if found != [net]:
            raise UserError(f"its LPIPS networks are {found}, but the weights are those of one '{net}'.")
        return {}

    # the network of the block PerceptualDistance, alone in a Frozen
    names = {f"preprocessor.network.{ours}": theirs for ours, theirs in lpips_names(net).items()}
    return Family(f"lpips_{net}", f"LPIPS({net})", names, describe, ignored=(r"scaling_layer\..*",))


VGG, ALEX = _family("vgg"), _family("alex")
