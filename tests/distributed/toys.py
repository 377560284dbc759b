"""Small data for distributed tests, drawn in memory, so that a run starts in no time; and the blocks of toy models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3m_like.core.block import ReadWriteBlock
from l3m_like.core.keys import KeySpec
from l3m_like.core.random import uniform
from l3m_like.data.packing import Stack
from l3m_like.losses import Loss


class Drawn:
    """A source of ``samples`` samples; sample i is ``self.draw(generator of i)``."""

    path = "drawn"

    def __init__(self, samples: int = 97) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def reference(self, index: int) -> str:
        return f"drawn#{index}"

    def read(self, index: int) -> dict[str, Any]:
        return self.draw(np.random.Generator(np.random.Philox(key=index)))

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


class Texts(Drawn):
    """Documents of 1 to 40 letters: rows hold different numbers of targets."""

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        letters = generator.integers(97, 123, size=generator.integers(1, 41), dtype=np.uint8)
        return {"text": letters.tobytes().decode()}


class Pictures(Drawn):
    """Grey images with a class."""

    def __init__(self, samples: int = 97, size: int = 14) -> None:
        super().__init__(samples)
        self.size = size

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        image = generator.uniform(-1, 1, (1, self.size, self.size)).astype(np.float32)
        return {"image": image, "image_label": np.array(generator.integers(10))}


class AsPicture:
    """The processor of ``Pictures``: takes the samples as they are."""

    unit = "images"

    def __init__(self, size: int = 14) -> None:
        self.size = size

    def keys(self) -> dict[str, KeySpec]:
        return {"image": KeySpec(torch.float32, (1, self.size, self.size)), "image_label": KeySpec(torch.int64, ())}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return sample


class Pairs(Drawn):
    """Grey images with a caption of 1 to 6 tokens."""

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        image = generator.uniform(-1, 1, (1, 14, 14)).astype(np.float32)
        tokens = generator.integers(1, 6 + 1)
        ids = generator.integers(0, 257, size=6) * (np.arange(6) < tokens)
        return {"image": image, "text_ids": ids, "text_mask": np.arange(6) < tokens}


class AsPair:
    """The processor of ``Pairs``."""

    unit = "images"

    def keys(self) -> dict[str, KeySpec]:
        text = {"text_ids": KeySpec(torch.int64, (6,)), "text_mask": KeySpec(torch.bool, (6,))}
        return {"image": KeySpec(torch.float32, (1, 14, 14))} | text

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return sample


# ---- an autoencoder and a critic ------------------------------------------------------------------------------------------


class Vectors(Drawn):
    """``x`` [6] and which of its entries count: a different number in every row."""

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        kept = generator.uniform(size=6) < generator.uniform()
        kept[0] = True
        return {"data_x": generator.normal(size=6).astype(np.float32), "data_kept": kept}


class AsVector:
    """The processor of ``Vectors``."""

    unit = "rows"

    def keys(self) -> dict[str, KeySpec]:
        return {"data_x": KeySpec(torch.float32, (6,)), "data_kept": KeySpec(torch.bool, (6,))}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return sample


#: the `data` section of a run on them
VECTORS: dict[str, Any] = {
    "train": {
        "_target_": "l3m_like.data.Dataset",
        "source": {"_target_": "tests.distributed.toys.Vectors"},
        "process": {"_target_": "tests.distributed.toys.AsVector"},
        "pack": {"_target_": "l3m_like.data.Stack"},
    }
}


class Encode(ReadWriteBlock):
    outputs = ("code",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(6, 4)

    def compute(self, x: Tensor) -> Tensor:
        return torch.tanh(self.proj(x.to(self.proj.weight.dtype)))


class Decode(ReadWriteBlock):
    outputs = ("recon",)

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.proj = nn.Linear(4, 6)

    def compute(self, code: Tensor) -> Tensor:
        return self.proj(code)


class Judge(ReadWriteBlock):
    """Scores [B] of the reconstruction and of the data."""

    outputs = ("fake", "real")

    def __init__(self, **ports: Any) -> None:
        super().__init__(**ports)
        self.score = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def compute(self, recon: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(recon).squeeze(-1), self.score(x.to(recon.dtype)).squeeze(-1)


class DrawMask(ReadWriteBlock):
    """A mask drawn in the model: its count is known only after the forward."""

    outputs = ("drawn",)

    def compute(self, x: Tensor, row: Tensor) -> Tensor:
        return uniform(row, (6,), seed=0, purpose="mask") < 0.4


class Rebuild(Loss):
    def compute(self, recon: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, (recon - x).square(), 0).sum()

    def count(self, kept: Tensor) -> Tensor:
        return kept.sum()


class WithWeights(Rebuild):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.net = nn.Linear(2, 2)


class LateRebuild(Loss):
    count_late = True

    def compute(self, recon: Tensor, x: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(drawn, (recon - x).square(), 0).sum(), drawn.sum().to(recon.dtype)


class Fool(Loss):
    def compute(self, fake: Tensor) -> Tensor:
        return -fake.sum()

    def count(self, kept: Tensor) -> Tensor:
        return torch.tensor(len(kept))


class Tell(Loss):
    def compute(self, fake: Tensor, real: Tensor) -> Tensor:
        return (F.softplus(fake) + F.softplus(-real)).sum()

    def count(self, kept: Tensor) -> Tensor:
        return torch.tensor(len(kept))


# ---- text with images ----------------------------------------------------------------------------------------------------


class Captions(Drawn):
    """Six letters; every second sample (at random) has an image of four patches, which stand after the first letter."""

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        sample = {"ids": generator.integers(0, 11, size=7)}
        return sample | ({"image": generator.normal(size=(3, 4, 4)).astype(np.float32)} if generator.uniform() < 0.4 else {})


class AsCaption:
    """The processor of ``Captions``."""

    unit = "rows"

    def keys(self) -> dict[str, KeySpec]:
        return {"ids": KeySpec(torch.int64, (7,)), "image": KeySpec(torch.float32, (3, 4, 4))}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in sample.items()}


class CaptionPack(Stack):
    """Rows of 6 text and 4 image tokens. ``fused_place`` [B, 10] says where each comes from: a text token (its number in
    [B * 6]) or an image's (B * 6 + its number in [N * 4]); a row without image repeats its last letter, without target."""

    def keys(self, sample: dict[str, KeySpec]) -> dict[str, KeySpec]:
        return {
            "text_ids": KeySpec(torch.int64, ("B", 6)),
            "fused_targets": KeySpec(torch.int64, ("B", 10)),
            "fused_place": KeySpec(torch.int64, ("B", 10)),
            "image": KeySpec(torch.float32, ("N", 3, 4, 4)),
        }

    def collate(self, rows: Any) -> dict[str, Tensor]:
        samples = [row[0].item.data for row in rows]
        place, targets, images = [], [], []
        for number, sample in enumerate(samples):
            text = np.arange(6) + 6 * number
            where = len(samples) * 6 + 4 * len(images) + np.arange(4) if "image" in sample else np.full(4, text[0])
            place.append(np.concatenate((text[:1], where, text[1:])))
            targets.append(np.concatenate((sample["ids"][1:2], np.full(4, -100), sample["ids"][2:])))
            images += [sample["image"]] if "image" in sample else []
        batch = {
            "text_ids": torch.from_numpy(np.stack([sample["ids"][:6] for sample in samples])),
            "fused_targets": torch.from_numpy(np.stack(targets)),
            "fused_place": torch.from_numpy(np.stack(place)),
        }
        # "no image" is either no key or an empty one: both are met
        if images or samples[0]["ids"][0] % 2:
            batch["image"] = torch.from_numpy(np.stack(images)) if images else torch.zeros(0, 3, 4, 4)
        return batch


class Join(ReadWriteBlock):
    """Text and image tokens in one sequence: ``cat`` and an index made by the loader."""

    outputs = ("tokens",)

    def compute(self, text: Tensor, image: Tensor, place: Tensor) -> Tensor:
        return torch.cat((text.flatten(0, 1), image.flatten(0, 1)))[place]
