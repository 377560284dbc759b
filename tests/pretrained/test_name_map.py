"""Name maps: every way in which tensors of ours lie in tensors of theirs, whole and region by region."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError
from l3m_like.pretrained import NameMap, Source, export_state, family, family_of, import_state
from tests.pretrained.tiny import LLM, config

TEMPLATES = {
    "embed.weight": Source("wte", copies=("copy.of.wte",)),
    "conv.weight": Source("patch.weight", shape=(-1, 3, 2, 2)),
    "layers.{i}.q.{leaf}": Source("h.{i}.qkv.{leaf}", part=0, parts=3),
    "layers.{i}.k.{leaf}": Source("h.{i}.qkv.{leaf}", part=1, parts=3),
    "layers.{i}.v.{leaf}": Source("h.{i}.qkv.{leaf}", part=2, parts=3),
    "layers.{i}.up": Source("h.{i}.fc", transpose=True),
    "layers.{i}.left": Source("h.{i}.both", part=0, parts=2, transpose=True),
    "layers.{i}.right": Source("h.{i}.both", part=1, parts=2, transpose=True),
    "layers.{i}.experts.down": Source("h.{i}.experts.{e}.down", stack="e"),
    "layers.{i}.experts.gate": Source("h.{i}.experts.{e}.gate_up", stack="e", part=0, parts=2),
    "layers.{i}.experts.up": Source("h.{i}.experts.{e}.gate_up", stack="e", part=1, parts=2),
    "layers.{i}.fused.gate": Source("h.{i}.fused", part=0, parts=2, axis=1, transpose=True),
    "layers.{i}.fused.up": Source("h.{i}.fused", part=1, parts=2, axis=1, transpose=True),
}


def ours() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (7, 4), "conv.weight": (5, 12)}
    for i in range(2):
        at = f"layers.{i}"
        for leaf, tail in (("weight", (4,)), ("bias", ())):
            shapes |= {f"{at}.q.{leaf}": (6, *tail), f"{at}.k.{leaf}": (2, *tail), f"{at}.v.{leaf}": (3, *tail)}
        shapes |= {f"{at}.up": (8, 4), f"{at}.left": (3, 4), f"{at}.right": (5, 4), f"{at}.experts.down": (3, 4, 6)}
        shapes |= {f"{at}.{kind}.{x}": (3, 6, 4) for kind in ("experts", "fused") for x in ("gate", "up")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_there_by_hand() -> None:
    tensors = ours()
    theirs = export_state(NameMap(TEMPLATES, tensors), tensors)
    assert torch.equal(theirs["copy.of.wte"], theirs["wte"])
    assert torch.equal(theirs["patch.weight"], tensors["conv.weight"].view(5, 3, 2, 2))
    q, k, v = (tensors[f"layers.1.{x}.weight"] for x in "qkv")
    assert torch.equal(theirs["h.1.qkv.weight"], torch.cat((q, k, v)))
    assert theirs["h.1.qkv.bias"].shape == (11,)
    assert torch.equal(theirs["h.0.fc"], tensors["layers.0.up"].T)
    assert torch.equal(theirs["h.0.both"], torch.cat((tensors["layers.0.left"], tensors["layers.0.right"])).T)
    gate, up = (tensors[f"layers.0.experts.{x}"] for x in ("gate", "up"))
    assert torch.equal(theirs["h.0.experts.2.gate_up"], torch.cat((gate[2], up[2])))
    gate, up = (tensors[f"layers.0.fused.{x}"] for x in ("gate", "up"))
    assert torch.equal(theirs["h.0.fused"], torch.cat((gate, up), dim=1).mT)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == NameMap(TEMPLATES, tensors).shapes


def test_back_again() -> None:
    tensors = ours()
    names = NameMap(TEMPLATES, tensors)
    back = import_state(names, export_state(names, tensors))
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_any_region_is_read_alone() -> None:
    """What a shard needs, and no more, is what the slices of the files give."""
    tensors = ours()
    names = NameMap(TEMPLATES, tensors)
    theirs = export_state(names, tensors)
    for name, tensor in tensors.items():
        cuts = [sorted({0, 1, size // 2, size}) for size in tensor.shape]
        ranges = [[(low, high) for low, high in itertools.combinations(c, 2)] for c in cuts]
        for bounds in itertools.product(*ranges):
            wanted = tensor[tuple(slice(*b) for b in bounds)]
            found = torch.full_like(wanted, torch.nan)
            read = 0
            for piece, inner, place in names.reads(name, bounds):
                block = theirs[piece.theirs][piece.region(inner)]
                read += block.numel()
                found[place] = piece.turned(block, inner)
            assert torch.equal(found, wanted), (name, bounds)
            assert read == wanted.numel() or name == "conv.weight"


def test_order_is_layer_by_layer() -> None:
    found = list(NameMap(TEMPLATES, ours()).theirs)
    assert found[:2] == ["wte", "patch.weight"] and found[2:5] == ["h.0.qkv.weight", "h.0.qkv.bias", "h.0.fc"]
    assert max(i for i, name in enumerate(found) if "h.0." in name) < min(i for i, name in enumerate(found) if "h.1." in name)


def test_what_has_no_place_is_an_error() -> None:
    tensors = ours() | {"layers.0.qq.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=re.escape("no place for 'layers.0.qq.weight'") + ".*Did you mean"):
        NameMap(TEMPLATES, tensors)
    assert NameMap(TEMPLATES, tensors, strict=False).left == ("layers.0.qq.weight",)
    del tensors["layers.0.k.bias"]
    with pytest.raises(UserError, match="makes 'h.0.qkv.bias' of 3 tensors; found are 'layers.0.q.bias', 'layers.0.v.bias'"):
        NameMap(TEMPLATES, tensors, strict=False)
    names = NameMap(TEMPLATES, ours())
    with pytest.raises(UserError, match="checkpoint has no 'wte'"):
        import_state(names, {})
    with pytest.raises(UserError, match="model has no 'embed.weight'"):
        export_state(names, {})


@pytest.mark.parametrize("wrong", [{"shape": (-1, 2), "parts": 2}, {"part": 2, "parts": 2}], ids=["view", "part"])
def test_a_source_that_makes_no_sense(wrong: dict) -> None:
    with pytest.raises(UserError, match="Source"):
        Source("x", **wrong)


def test_adapters_and_parts_of_their_own_are_not_looked_for() -> None:
    model = nn.Module()
    model.embed = nn.Embedding(7, 4)
    model.embed.register_parameter("lora_a", nn.Parameter(torch.zeros(1, 4)))
    model.teacher = nn.Linear(2, 2)
    names = NameMap.of({"embed.weight": "wte"}, model, without=("teacher",))
    assert list(names.pieces) == ["embed.weight"] and not names.left


def test_a_block_in_a_named_dict_keeps_its_name() -> None:
    model = nn.Module()
    model.preprocessor = nn.ModuleDict({"text": nn.Linear(2, 2, bias=False)})
    assert list(NameMap.of({"preprocessor.weight": "wte"}, model).theirs) == ["wte"]


def test_families_are_found_by_model_type() -> None:
    assert family("qwen3").architecture == "Qwen3ForCausalLM"
    assert family("l3m_like.pretrained.llama.FAMILY") is family("llama")
    with pytest.raises(UserError, match="no family for model_type 'qwen4'. Did you mean 'qwen"):
        family("qwen4")
    with pytest.raises(UserError, match="No module named 'nowhere'"):
        family("nowhere.FAMILY")
    with pytest.raises(UserError, match="is no Family"):
        family("l3m_like.pretrained.llama.decoder")
    with pytest.raises(UserError, match="none of those that are known:\n  llama: it has no TokenEmbed"):
        family_of(nn.Linear(1, 1))
    fixed = RunConfig.from_file(LLM.with_name("gpt2.yaml"), ["+model.preprocessor.fixed=true"])
    with torch.device("meta"), pytest.raises(UserError, match="gpt2: its positions are fixed sinusoids"):
        family_of(fixed.instantiate("model"))
    assert family_of(config("mistral", None).instantiate("model")).model_type == "mistral"
    assert family_of(config("mistral", None, "window=null").instantiate("model")).model_type == "llama"


def test_which_files_are_which(tmp_path, monkeypatch) -> None:
    import huggingface_hub

    from l3m_like.pretrained.folder import FolderMissing, find_folder

    for name, keys in (("mae.pth", ["decoder_embed.weight"]), ("rae.pth", ["decoder_embed.weight", "trainable_cls_token"])):
        torch.save(dict.fromkeys(keys, torch.zeros(1)), tmp_path / name)
    assert find_folder(str(tmp_path / "rae.pth"), "init.from").model_type == "rae_decoder"
    with pytest.raises(UserError, match="is of no kind that is known"):
        _ = find_folder(str(tmp_path / "mae.pth"), "init.from").model_type
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "config.json").write_text("{}")  # as a tokenizer alone leaves it
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: str(tmp_path / "cached"))
    with pytest.raises(FolderMissing, match="or no weights of it"):
        find_folder("someone/something", "init.from", download=False)
