"""Metrics of sets of pictures against direct formulas and other libraries; equal for every batch and number of processes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from l3m_like.core.errors import UserError
from l3m_like.core.torchvision_ops import allow_torchvision
from l3m_like.distributed.mesh import build_mesh
from l3m_like.evaluations import EfficientNetLite0, Inception, Judge, SampleQuality, image_sets
from l3m_like.evaluations.extractors import Features, resize, to_pixels
from l3m_like.evaluations.image_sets import (
    InceptionScore,
    Moments,
    Statistics,
    compare,
    described,
    frechet_distance,
    precision_recall,
)
from l3m_like.evaluations.judge import JudgedAccuracy
from l3m_like.evaluations.pictures import of_dataset, of_gaussians
from l3m_like.evaluations.sample_quality import collect_statistics
from l3m_like.generate import FlowODE
from l3m_like.layers.inception import InceptionV3
from tests.distributed.pool import run as on_ranks

ONE = SimpleNamespace(dp_size=1, dp_rank=0, speaks_for_rows=True, sum=lambda values: values, device=torch.device("cpu"))


def rows_of(count: int, width: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + mean


def moments_of(rows: Tensor, batch: int = 1000) -> Moments:
    moments = Moments()
    for part in rows.split(batch):
        moments.add(part)
    return moments


@pytest.mark.parametrize("count", [200, 12], ids=["full rank", "singular"])
def test_frechet_distance_by_scipy(count) -> None:
    x, y = rows_of(count, 20), rows_of(count + 30, 20, seed=1, mean=0.3)
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cov_x + cov_y - 2 * np.real(root))
    found = frechet_distance(moments_of(x, 7), moments_of(y, 3))
    # the root of a singular product is exact to the root of the rounding error only
    assert found == pytest.approx(expected, rel=1e-10 if count == 200 else 1e-5)
    assert frechet_distance(moments_of(x), moments_of(x)) == pytest.approx(0, abs=1e-6 * float(cov_x.trace()))
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(moments_of(x[:1]), moments_of(x))


def test_frechet_distance_of_known_gaussians() -> None:
    """Of two lines of points with known mean and variance: (m1 - m2)^2 + (s1 - s2)^2."""
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    assert frechet_distance(moments_of(x), moments_of(3 * x + 2)) == pytest.approx(4 + 4 * float(x.var()), rel=1e-12)


def test_precision_and_recall_by_brute_force() -> None:
    real, made = rows_of(40, 5), rows_of(30, 5, seed=1, mean=0.5)

    def share(points: Tensor, manifold: Tensor) -> float:
        inside = 0
        for point in points:
            for centre in manifold:
                reach = sorted(float((centre - other).norm()) for other in manifold)[3]  # itself is the first
                if float((point - centre).norm()) <= reach:
                    inside += 1
                    break
        return inside / len(points)

    assert precision_recall(real, made, 3, ONE) == (share(made, real), share(real, made))
    assert precision_recall(real, real, 3, ONE) == (1.0, 1.0)
    assert precision_recall(real, real + 1000, 3, ONE) == (0.0, 0.0)
    half = torch.cat((real[:20], real[:20] + 1000))  # half of the pictures are real ones
    assert precision_recall(real, half, 3, ONE)[0] == 0.5
    with pytest.raises(UserError, match="more pictures than 3"):
        precision_recall(real, made[:3], 3, ONE)


def test_inception_score_by_its_formula() -> None:
    logits = rows_of(30, 6).float()
    score = InceptionScore(30, 3)
    for start in range(0, 30, 7):
        score.add(logits[start : start + 7], torch.arange(start, min(start + 7, 30)))
    p = logits.double().softmax(-1)
    parts = [part * (part / part.mean(0)).log() for part in p.split(10)]
    assert score.result() == pytest.approx(float(np.mean([part.sum(1).mean().exp() for part in parts])), rel=1e-10)
    sure = InceptionScore(6, 1)
    sure.add(100 * torch.eye(6), torch.arange(6))
    assert sure.result() == pytest.approx(6, rel=1e-10)  # the most that six classes give


def test_resize_is_that_of_pil() -> None:
    pixels = (torch.rand(1, 2, 40, 40, generator=torch.Generator().manual_seed(0)) * 255).round()
    for size in (17, 90):
        found = resize(pixels, size)
        for channel in range(2):
            picture = Image.fromarray(pixels[0, channel].numpy()).resize((size, size), Image.Resampling.BICUBIC)
            assert np.abs(found[0, channel].numpy() - np.asarray(picture).clip(0, 255)).max() < 2e-3
    assert to_pixels(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]


def test_inception_is_the_network_of_fid(monkeypatch) -> None:
    """torchvision's network, with the three known differences of the one that FID uses."""
    allow_torchvision()
    from torchvision.models import inception as theirs

    def pool_of_c(x: Tensor, **kwargs: Any) -> Tensor:
        return F.avg_pool2d(x, **kwargs, count_include_pad=False)

    monkeypatch.setattr(theirs, "F", SimpleNamespace(**(vars(F) | {"avg_pool2d": pool_of_c})))
    torch.manual_seed(0)
    reference = theirs.inception_v3(num_classes=1008, aux_logits=False, init_weights=False, weights=None).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.9, 1.1)
    ours = InceptionV3().eval()
    ours.load_state_dict(reference.state_dict())  # the published names
    cells: list[Tensor] = []
    reference.Mixed_6d.register_forward_hook(lambda module, args, out: cells.append(out))
    last = reference.Mixed_7c

    def last_with_maximum(x: Tensor) -> Tensor:
        most = SimpleNamespace(**(vars(F) | {"avg_pool2d": lambda x, **kwargs: F.max_pool2d(x, 3, 1, 1)}))
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "F", most)
            return torch.cat(last._forward(x), 1)

    last.forward = last_with_maximum
    x = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        logits = reference(x)
        pooled, found_cells, found_logits = ours(x)
    found_logits = found_logits + ours.fc.bias.detach()
    assert float((found_logits - logits).abs().max()) < 1e-4 * float(logits.abs().max())
    assert float((found_cells - cells[0]).abs().max()) < 1e-4 * float(cells[0].abs().max()) and pooled.shape == (1, 2048)
    assert float(cells[0].std()) > 0.1 and float(pooled.std()) > 0.1
    ours.Mixed_7c.pool = "mean"  # planted: what the usual network does
    with torch.no_grad():
        other = ours.fc(ours(x)[0])
    assert float((other - logits).abs().max()) > 1e-3 * float(logits.abs().max())


def test_efficientnet_knows_a_cat() -> None:
    from skimage import data

    cat = torch.from_numpy(data.chelsea()[:300, 75:375].transpose(2, 0, 1).copy())[None].float() / 127.5 - 1
    extractor = EfficientNetLite0()
    features = extractor(cat)
    assert 281 <= int(features.logits.argmax()) <= 285, "the cats of ImageNet"
    assert features.pooled.shape == (1, 1280) and features.cells.shape == (1, 7 * 14 * 14)
    assert extractor.name == "EfficientNet-Lite0 (efficientnet-lite0-57934424.pth)"


def test_weights_are_never_silently_random(tmp_path) -> None:
    with pytest.raises(UserError, match="random_weights: true"):
        Inception()
    with pytest.raises(UserError, match="not both"):
        Inception("weights.pth", random_weights=True)
    with pytest.raises(UserError, match="no weights at"):
        Inception(str(tmp_path / "weights.pth")).check()
    torch.save({"conv": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the weights of Inception"):
        Inception(str(tmp_path / "weights.pth"))(torch.zeros(1, 3, 8, 8))
    state = torch.random.get_rng_state()
    one, other = (EfficientNetLite0(random_weights=True) for _ in range(2))
    assert one.name == "EfficientNet-Lite0 with random weights"
    image = torch.zeros(1, 1, 16, 16)
    assert torch.equal(one(image).pooled, other(image).pooled)
    assert torch.equal(torch.random.get_rng_state(), state), "training's generator was touched"


class Corners:
    """An extractor without a network: some pixels, and sums of them."""

    name = "corners"

    def check(self) -> None:
        pass

    def __call__(self, images: Tensor) -> Features:
        pixels = to_pixels(images).flatten(1) / 255
        return Features(pixels[:, :6], pixels[:, -8:], pixels[:, :5] + pixels[:, 5:10])


def quality_on(run: Any, axes: dict[str, int], batch: int) -> dict[str, float]:
    """Of a tiny run's samples against the held-out pictures, with the run beside it as judge."""
    from l3m_like import load

    mesh = build_mesh(axes)
    loaded = load(run, mesh=mesh)
    data = loaded.config.instantiate("evals.heldout.data")
    sampler = FlowODE((1, 8, 8), 10, steps=2, guidance=2.0, num_samples=23, batch=batch)
    judge = Judge(run.parent / "vit")
    quality = SampleQuality(data, Corners(), sampler, real=41, batch=batch, splits=2, judge=judge)
    quality.check(loaded.model)
    found = quality.evaluate(loaded.model, mesh=mesh, step=0, seed=0, folder=run)
    assert found.notes == {"extractor": "corners", "pictures": "23 generated, 41 real", "judge": "vit, step 2"}
    again = quality.evaluate(loaded.model, mesh=mesh, step=0, seed=0, folder=run)
    assert again == found
    return dict(found.values)


def test_sample_quality_is_the_same_on_every_mesh(tmp_path) -> None:
    from tests.generate.tiny import save_run

    run = save_run(tmp_path / "sit", "sit")
    save_run(tmp_path / "vit", "vit")
    expected = quality_on(run, {}, 7)
    judged = {"fid", "sfid", "inception_score", "precision", "recall", "class_accuracy"}
    assert set(expected) == judged and expected["fid"] > 0 and 0 < expected["class_accuracy"] < 1
    for found in (quality_on(run, {}, 3), *on_ranks(2, quality_on, run, {"dp_shard": 2}, 7)):
        assert found == pytest.approx(expected, rel=1e-9)


def test_worse_pictures_have_a_larger_distance() -> None:
    """With features of real pictures: the more noise, the farther."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(60, 1, 8, 8, generator=generator).cumsum(-1).cumsum(-2)
    image = image / image.amax((1, 2, 3), keepdim=True) * 2 - 1

    def statistics(images: Tensor) -> Statistics:
        batches = [(list(range(at, at + 20)), images[at : at + 20], True) for at in range(0, 60, 20)]
        return collect_statistics(batches, Corners(), Statistics(("fid", "sfid")), ONE)

    real = statistics(image)
    found = [
        compare(real, statistics(image + noise * torch.randn(image.shape, generator=generator)), ("fid", "sfid"), 3, ONE)
        for noise in (0.0, 0.1, 0.5)
    ]
    for name in ("fid", "sfid"):
        first, second, third = (values[name] for values in found)
        assert abs(first) < 1e-10 < second < third
    with pytest.raises(UserError, match="Did you mean 'fid'"):
        Statistics(("fidd",))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_precision_and_recall_do_not_depend_on_the_block(block, monkeypatch) -> None:
    real, made = rows_of(40, 5), rows_of(30, 5, seed=1, mean=0.5)
    expected = precision_recall(real, made, 3, ONE)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    seen: list[int] = []
    within = image_sets.distances
    monkeypatch.setattr(image_sets, "BLOCK", block)
    monkeypatch.setattr(image_sets, "distances", lambda x, y: seen.append(len(x) * len(y)) or within(x, y))
    assert precision_recall(real, made, 3, ONE) == expected
    assert max(seen) <= block * block


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    from tests.generate.tiny import save_run

    return save_run(tmp_path_factory.mktemp("runs") / "vit", "vit")


def heldout() -> Any:
    from l3m_like.config import RunConfig
    from tests.generate.tiny import CONFIGS, OVERRIDES

    return RunConfig.from_file(CONFIGS / "sit.yaml", OVERRIDES["sit"]).instantiate("evals.heldout.data")


def test_class_accuracy_is_that_of_the_judge(vit) -> None:
    """Of real pictures, which the judge must see as a PNG would hold them."""
    from l3m_like import load

    data, judge = heldout(), Judge(vit)
    pictures = of_dataset(data, 16, ONE, 60)
    accuracy = JudgedAccuracy(judge, pictures.label)
    images = torch.cat([images for _, images, _ in accuracy.watch(pictures.batches)])
    labels = torch.tensor([pictures.label(row) for row in range(60)])
    data = {"image": images.double(), "image_label": labels, "row": torch.arange(60)}
    expected = load(vit, dtype="float64")(data)["image_logits"].argmax(-1)
    assert torch.equal(judge.classes(images), expected) and len(expected.unique()) > 1
    assert accuracy.result(ONE) == float((expected == labels).double().mean())
    assert torch.equal(judge.classes(images + 0.3 / 127.5), expected), "what a PNG would not hold was seen"
    with pytest.raises(UserError, match="have 3 channels"):
        judge.classes(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="has learned nothing"):
        Judge(Path(__file__).parents[2] / "configs" / "experiment" / "vit.yaml").check()


def test_gaussians_of_no_data_are_refused(tmp_path: Path) -> None:
    tool = runpy.run_path(str(Path(__file__).parents[2] / "run" / "evaluate_images.py"))
    with pytest.raises(UserError, match="the name of the data is missing; write .*:NAME:gaussians"):
        tool["named"](f"{tmp_path}::gaussians")


def test_gaussians_have_the_moments_of_each_class() -> None:
    data = heldout()
    pictures = of_gaussians(data, 100, ONE, 4000)
    made = torch.cat([images for _, images, _ in pictures.batches]).double()
    other = of_gaussians(data, 7, SimpleNamespace(**vars(ONE) | {"dp_size": 2, "dp_rank": 1}), 20)  # the odd ones
    assert torch.equal(torch.cat([images for _, images, _ in other.batches]), made[1:20:2].float())
    real = of_dataset(data, 100, ONE)
    images = torch.cat([images for _, images, _ in real.batches]).double()
    labels = torch.tensor([real.label(row) for row in range(len(images))])
    assert [pictures.label(row) for row in (0, 9, 10)] == [0, 9, 0]
    for label in (0, 7):
        ours, theirs = made[label::10], images[labels == label]
        deviation = theirs.std(0)
        assert float((ours.mean(0) - theirs.mean(0)).abs().max()) < 5 * float(deviation.max()) / 400**0.5
        assert float((ours.std(0) - deviation).abs().max()) < 5 * float(deviation.max()) / 800**0.5
        independent = torch.corrcoef(((ours - theirs.mean(0)) / deviation.clamp_min(1e-3)).flatten(1).mT[24:40])
        assert float((independent - torch.eye(16)).abs().max()) < 5 / 400**0.5


def test_command(vit, tmp_path, monkeypatch, capsys) -> None:
    from l3m_like import evaluations
    from run import evaluate_images

    monkeypatch.setattr(evaluations, "Inception", lambda *args, **settings: Corners(), raising=False)
    word = f"{vit}:heldout"
    out = tmp_path / "found.json"
    options = f"--extractor inception --metrics fid --samples 40 --judge {vit} --out {out}".split()
    found = []
    for generated in (word, f"{word}:gaussians"):
        assert evaluate_images.main([generated, word, *options]) == 0
        found.append(json.loads(out.read_text()))
    assert abs(found[0]["fid"]) < 1e-9 < found[1]["fid"] and "class_accuracy" in capsys.readouterr().out
    assert found[0]["generated"] == found[1]["generated"] == 40
    assert evaluate_images.main([f"{word}:gaussian", word, *options]) == 1 and "not 'gaussian'" in capsys.readouterr().err
    (tmp_path / "png").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "png" / "a.png")
    assert evaluate_images.main([str(tmp_path / "png"), word, *options]) == 1
    assert "are not known" in capsys.readouterr().err


def drawn_of(total: int, batch: int, most: int, rank: int = 0, size: int = 1) -> tuple[Statistics, int]:
    """Statistics of pictures whose one feature is their number, and the most features that were held."""
    statistics, held = Statistics(("precision",), most=most), 0
    numbers = torch.arange(rank, total, size)
    for rows in numbers.split(batch):
        features = rows[:, None].double()
        statistics.add(Features(features, features, features), rows.tolist())
        held = max(held, len(statistics._kept))
    statistics.merge(build_mesh({} if size == 1 else {"dp_replicate": size, "dp_shard": 1}), Features(*[torch.zeros(1, 1)] * 3))
    return statistics, held


def drawn_on_ranks(total: int, batch: int, most: int, size: int) -> Tensor:
    import torch.distributed as dist

    return drawn_of(total, batch, most, dist.get_rank(), size)[0].features


def test_a_huge_set_is_drawn_from() -> None:
    """At most so many features are held, of pictures from everywhere, the same whatever the batches and ranks."""
    statistics, held = drawn_of(1000, 64, 50)
    assert held == 50 and statistics.count == 1000
    chosen = statistics.features[:, 0]
    assert len(chosen) == 50 and chosen.equal(chosen.sort().values) and 400 < float(chosen.mean()) < 600
    assert drawn_of(1000, 7, 50)[0].features.equal(statistics.features)
    for features in on_ranks(2, drawn_on_ranks, 1000, 33, 50, 2):
        assert features.equal(statistics.features)
    assert drawn_of(40, 64, 50)[0].features[:, 0].tolist() == list(range(40))  # all, in their order
    few, _ = drawn_of(40, 64, 50)
    assert described(few, statistics) == "40 generated, 1000 real (precision and recall: 40 and 50 of them)"


def test_what_cannot_be_judged(monkeypatch, tmp_path) -> None:
    from l3m_like.evaluations import judge as module
    from run import evaluate_images

    texts = FlowODE((1, 8, 8), 10, steps=2, num_samples=4, embeddings="texts.npy")
    with pytest.raises(UserError, match="samples are of texts"):
        SampleQuality(SimpleNamespace(), Corners(), texts, judge=SimpleNamespace())
    from tests.generate.tiny import save_run

    for kind, last in {"llm": "LanguageModelHead, writes text_logits", "sit": "PatchDecode, writes image_prediction"}.items():
        with pytest.raises(UserError, match=f"no classifier: no block writes image_logits, .*{last}. Give the run of a"):
            Judge(save_run(tmp_path / kind, kind) / "checkpoints" / "step_00000002").check()
    head = SimpleNamespace(writes_in=lambda inference: {"logits": "image_logits"})
    graph = SimpleNamespace(steps=[SimpleNamespace(block=head)])
    loaded = SimpleNamespace(step=2, model=None, processor=lambda: None, inference={"": graph})
    monkeypatch.setattr(module, "load", lambda *args: loaded)
    judge = Judge("somewhere")
    for _ in range(2):
        with pytest.raises(UserError, match="do not say how large pictures are"):
            judge.check()
    with pytest.raises(UserError, match="it has 4 parts"):
        evaluate_images.named(f"{tmp_path}:train:gaussians:more")
    assert evaluate_images.named(f"{tmp_path}:train:gaussians") == (str(tmp_path), "train", "gaussians")
    assert evaluate_images.named(str(tmp_path)) == (str(tmp_path), "", "")
