"""Sampling from masks: what is committed when, and that neither the batch, padding, cache nor mesh change a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l3m_like import load
from l3m_like.core import MetaModel, ReadWriteBlock, UserError
from l3m_like.data import Tokenize
from l3m_like.distributed.mesh import build_mesh
from l3m_like.generate import MaskedDiffusion
from l3m_like.training.load import Loaded
from tests.distributed.pool import run as on_ranks
from tests.generate.tiny import PROMPTS, save_run, tiny

BYTES = Tokenize("bytes", vocab_size=257)
MASK = 257


@pytest.fixture(scope="module")
def models() -> dict[str, Loaded]:
    return {name: tiny(name) for name in ("dllm", "block_diffusion")}


def tokens(loaded: Loaded, **settings) -> list[list[int]]:
    return loaded.generate(**({"prompts": PROMPTS, "max_new_tokens": 12, "end": False, "temperature": 1.0} | settings)).tokens


SETTINGS = {
    "as shipped": {},
    "likeliest": {"temperature": 0.0, "steps": 3},
    "random": {"remasking": "random", "top_p": 0.9},
    "entropy": {"remasking": "entropy", "top_k": 20, "steps": 2},
    "guided": {"guidance": 1.5, "threshold": 0.02},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["dllm", "block_diffusion"])
def test_batch_padding_and_cache_change_nothing(models, name: str, settings: dict) -> None:
    block = {"block": 5} if name == "dllm" else {}
    found = tokens(models[name], **block, **settings)
    assert all(len(row) == 12 and MASK not in row for row in found) and len({*map(tuple, found)}) == 4
    assert found == tokens(models[name], batch=1, **block, **settings)
    if name == "block_diffusion":
        assert found == tokens(models[name], cache=False, batch=3, **settings)
    alone = tokens(models[name], prompts=PROMPTS[:1], **block, **settings)  # another length of the padded rows
    assert alone == found[:1]


def test_draws_depend_on_seed_row_and_step(models) -> None:
    two = tokens(models["dllm"], prompts=["a"], num_samples=2)
    assert two[0] != two[1] and two != tokens(models["dllm"], prompts=["a"], num_samples=2, seed=1)
    assert tokens(models["dllm"], prompts=["a"], num_samples=2, temperature=0.0)[0] == tokens(
        models["dllm"], prompts=["a"], temperature=0.0, seed=1
    )[0]


# ---- what is committed when ------------------------------------------------------------------------------------------


class Known(ReadWriteBlock):
    """Logits by place alone: [S, V], where token v of place p has the probability ``table[p][v]``; it notes what it is shown."""

    outputs = ("logits",)

    def __init__(self, table: Tensor, mask: str = "full") -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table.log())
        self.mask = mask
        self.shown: list[list[int]] = []

    def compute(self, noised: Tensor, document_ids: Tensor, stages: Tensor | None = None) -> Tensor:
        self.shown += noised.tolist()
        return self.table[: noised.shape[1]].expand(len(noised), -1, -1)


def shown(table: list[list[float]], **settings) -> list[str]:
    """The rows that the model was shown, with "." for a mask (number 4)."""
    model = MetaModel(head=Known(torch.tensor(table, dtype=torch.float64)), stream="text")
    made = MaskedDiffusion([[0]], len(table) - 1, 4, **settings).run(model)
    rows = [*model.head.shown, [0, *made.tokens[0]]]
    return ["".join("0123."[token] for token in row) for row in rows]


TABLE = [[1.0, 0, 0, 0, 0]] + [[0, p, 1 - p - 0.02, 0, 0.02] for p in (0.6, 0.9, 0.7, 0.8, 0.95)]


def test_the_surest_stay_and_blocks_go_from_left_to_right() -> None:
    # one by one: 0.95, 0.9, 0.8, 0.7, 0.6; the mask itself is never drawn
    assert shown(TABLE) == ["0.....", "0....1", "0.1..1", "0.1.11", "0.1111", "011111"]
    assert shown(TABLE, steps=2) == ["0.....", "0.1.11", "011111"]  # an even share, the remainder first: 3, 2
    assert shown(TABLE, block=2, steps=1) == ["0.....", "011...", "01111.", "011111"]
    assert shown(TABLE, block=3) == ["0.....", "0.1...", "0.11..", "0111..", "0111.1", "011111"]
    # all above the threshold at once, and at least the share of the step; a block that is full is left
    assert shown(TABLE, threshold=0.75) == ["0.....", "0.1.11", "0.1111", "011111"]
    assert shown(TABLE, threshold=0.97, block=2) == shown(TABLE, block=2)
    assert shown(TABLE, never=[1], steps=1) == ["0.....", "022222"]
    assert shown(TABLE, steps=1, shift=True) == ["0.....", "001111"]  # place i from the logits at i - 1


def test_order_by_entropy_and_by_draw() -> None:
    # sure by probability: place 1 (0.5 against many), by entropy: place 2 (two tokens alone)
    table = [[1.0, 0, 0, 0, 0], [0.17, 0.5, 0.17, 0.16, 0], [0, 0.49, 0.51 - 0.02, 0.02, 0]]
    assert shown(table)[1] == "01." and shown(table, remasking="entropy")[1][1] == "."
    orders = {tuple(shown(TABLE, remasking="random", seed=seed)) for seed in range(12)}
    assert len(orders) > 6 and all(rows[-1] == "011111" for rows in orders)


def test_temperature_draws_as_gumbel_noise_does() -> None:
    """arg max of logits + T * Gumbel (LLaDA's form) has the frequencies of what is drawn here."""
    chances = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    model = MetaModel(head=Known(torch.stack([chances] * 101)), stream="text")
    drawn = MaskedDiffusion([[0]], 100, 4, steps=1, temperature=0.7, num_samples=60).run(model).tokens
    found = torch.tensor(drawn).flatten().bincount(minlength=5) / 6000
    uniform = torch.rand(6000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gumbel = (chances.log() - 0.7 * (-uniform.log()).log()).argmax(-1).bincount(minlength=5) / 6000
    exact = chances ** (1 / 0.7) / (chances ** (1 / 0.7)).sum()
    assert float((found - exact).abs().max()) < 0.02 and float((gumbel - exact).abs().max()) < 0.02


def test_guidance_is_the_formula(models) -> None:
    """One step over one mask: logits = null + (w + 1) (conditional - null)."""
    found = tokens(models["dllm"], max_new_tokens=1, guidance=2.0, temperature=0.0)
    differ = 0
    for prompt, made in zip(PROMPTS, found, strict=True):
        ids = BYTES.encode(prompt)
        rows = torch.tensor([[*ids, MASK], [MASK] * (len(ids) + 1)])
        data = {"text_noised": rows, "text_document_ids": torch.zeros_like(rows, dtype=torch.int32)}
        conditional, null = models["dllm"](data)["text_logits"][:, -1, :MASK]
        assert made == [int((null + 3 * (conditional - null)).argmax())]
        differ += made != [int(conditional.argmax())]
    assert differ  # it matters here


def test_rows_end_at_the_end_token() -> None:
    table = torch.full((9, 258), 1e-9, dtype=torch.float64)
    table[range(9), [0, 97, 98, 256, 99, 100, 101, 102, 103]] = 1.0
    model = MetaModel(head=Known(table), stream="text")
    settings = {"max_new_tokens": 8, "mask_id": MASK, "block": 2}
    ended = MaskedDiffusion([[0]], **settings).run(model, process=BYTES)
    assert ended.tokens == [[97, 98]] and ended.texts == ["ab"] and len(model.head.shown) == 4  # two blocks of four
    on = MaskedDiffusion([[0]], end=False, **settings).run(model, process=BYTES)
    assert on.tokens == [[97, 98, 256, 99, 100, 101, 102, 103]]
    assert MaskedDiffusion([[]], 3, MASK).run(model).tokens == [[0, 97, 98]]  # nothing before it


# ---- on a mesh -------------------------------------------------------------------------------------------------------


def sampled(run, axes: dict[str, int], calls: list[dict]) -> list:
    loaded = load(run, mesh=build_mesh(axes))
    return [tokens(loaded, **settings) for settings in calls]


@pytest.mark.parametrize("axes", [pytest.param({"dp_shard": 2}, marks=pytest.mark.slow), {"tp": 2}], ids=str)
def test_texts_on_a_mesh(tmp_path_factory, axes) -> None:
    calls = [{"prompts": PROMPTS[:3]}, {"prompts": PROMPTS[:3], "batch": 1, "guidance": 0.5, "threshold": 0.05}]
    for name in ("dllm", "block_diffusion"):
        folder = save_run(tmp_path_factory.mktemp("runs") / name, name)
        here = load(folder)
        expected = [tokens(here, **settings) for settings in calls]
        for found in on_ranks(2, sampled, folder, axes, calls):
            assert found == expected


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": "ROMEO:"}, "it is a list"),
        ({"block": 0}, "block is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"remasking": "low_confidense"}, "Did you mean 'low_confidence'"),
        ({"threshold": 0.9, "remasking": "random"}, "goes with low_confidence"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"guidance": -0.5}, "guidance is -0.5"),
        ({"prompts": [""], "guidance": 1.0}, "guidance: 1.0 needs one"),
        ({"prompts": [""], "shift": True}, "shift: True needs one"),
        ({"into": "paired"}, "reads 'text_noised'"),
    ],
)
def test_bad_settings(models, settings, words) -> None:
    with pytest.raises(UserError, match=words):
        MaskedDiffusion(**({"prompts": ["a"], "max_new_tokens": 1, "mask_id": MASK} | settings)).run(
            models["dllm"].model, process=BYTES
        )


def test_what_does_not_fit(models) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        MaskedDiffusion(["a"], 1, MASK).run(models["dllm"].model)
    with pytest.raises(UserError, match="give the `block`"):
        MaskedDiffusion([[1]], 1, MASK, into="paired").run(models["block_diffusion"].model)
    with pytest.raises(UserError, match="do not go together"):
        MaskedDiffusion([[1]], 1, MASK, into="paired", block=16, shift=True).run(models["block_diffusion"].model)
