"""Rotary tables of several axes against those of Qwen2-VL, Qwen3-VL and Wan."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.kernels.rope import apply_rope
from l3m_like.layers import MultiAxisRope, Rope
from tests.parity.rule import check_values

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}


def positions() -> Tensor:
    """Of two rows [3, 2, 40]: text, then 4 x 3 x 2 patches of a video at the same start, then text again."""
    patches = torch.tensor(list(product(range(4), range(3), range(2)))).T + 8
    rows = [torch.cat((torch.arange(8).expand(3, -1), patches, torch.arange(12, 20).expand(3, -1)), 1)]
    return torch.stack([*rows, rows[0] * 5 + torch.tensor([[0], [7], [30]])], 1)


def theirs(layout: str, sections: list[int], theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [2, 40, K] of transformers, which computes them in float32."""
    from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    make, config = {
        "blocks": (Qwen2VLRotaryEmbedding, Qwen2VLTextConfig), "interleaved": (Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig),
    }[layout]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, "mrope_interleaved": layout == "interleaved"}
    sizes = {"hidden_size": 2 * sum(sections), "num_attention_heads": 1, "head_dim": 2 * sum(sections)}
    return make(config(**sizes, rope_parameters=rope))(torch.zeros(()), positions())


@pytest.mark.parametrize(
    ("layout", "sections", "theta"),
    [
        *(("blocks", [16, 24, 24], 1e6), ("blocks", [2, 3, 3], 1e4)),
        *(("interleaved", [24, 20, 20], 5e6), ("interleaved", [4, 2, 2], 1e4)),
    ],
)
def test_equals_the_class(layout: str, sections: list[int], theta: float) -> None:
    rope = MultiAxisRope(2 * sum(sections), theta, sections, layout)
    expected = theirs(layout, sections, theta)
    for ours, table in zip(rope(positions()), expected, strict=True):
        check_values(ours, table)
    for ours, table in zip(rope(positions()[[0, 2, 1]]), expected, strict=True):  # height and width exchanged
        with pytest.raises(AssertionError):
            check_values(ours, table)


def test_a_text_has_the_same_positions_on_all_axes() -> None:
    place = torch.arange(12).view(2, 6) * 3
    plain = Rope(16, 1e4)(place, torch.float64)
    for layout, given in product(("blocks", "interleaved"), (place, place.expand(3, -1, -1))):
        for ours, table in zip(MultiAxisRope(16, 1e4, [4, 2, 2], layout)(given, torch.float64), plain, strict=True):
            assert torch.equal(ours, table)


def test_axial_equals_wan() -> None:
    """In float32, the dtype of its tables."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    heads, width = 2, 20  # 10 pairs: 4 of time, 3 of height and of width
    cos, sin = WanRotaryPosEmbed(width, (1, 2, 2), 64)(torch.zeros(1, 1, 4, 6, 4))  # 4 x 3 x 2 patches
    x = torch.randn(1, 24, heads, width, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.complex(cos, sin)[..., ::2]).flatten(-2)  # [1, 24, H, K]
    place = torch.tensor(list(product(range(4), range(3), range(2)))).T.unsqueeze(1)
    tables = MultiAxisRope(width, 1e4, [4, 3, 3], "axial")(place)
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    check_values(apply_rope(x[..., order], *tables), expected[..., order])
    with pytest.raises(AssertionError):
        check_values(apply_rope(x, *tables), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sections": [4, 4]}, "positions of 3 axes, and 2 sections"),
        ({"sections": [2, 2, 2]}, "at least 1 each, and 8 together"),
        ({"sections": [2, 3, 3], "layout": "interleaved"}, r"come out as \[3, 3, 2\]"),
        ({"sections": [4, 2, 2], "layout": "axail"}, "Did you mean 'axial'"),
        ({"sections": [4, 2, 2], "layout": "axial", "scaling": YARN}, "leave it out"),
    ],
)
def test_refusals(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        MultiAxisRope(16, 1e4, **settings)(positions())
