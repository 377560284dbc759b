"""SIGKILL at every named point of a save, in the middle of a step and at random moments, on one rank and on all; then the
same command again. The losses and the samples of every step must be those of a run that nobody killed; of an autoencoder with
its discriminator, all that a checkpoint holds."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# imported here, once: the forked processes inherit them
from l3m_like.config import RunConfig
from l3m_like.data import MegatronWriter
from l3m_like.training import checkpoint, report, train, updates
from tests.distributed.pool import clean_forks
from tests.distributed.recorder import experiment

STEPS = 9
ROOT = Path(__file__).resolve().parents[2]
POINTS = ("staging", "mid_write", "before_marker", "between_marker_and_latest", "during_pruning", "mid_step")

LLM = [
    "dim=16", "layers=1", "heads=2", "kv_heads=1", "head_dim=8", "mlp_dim=16", "sequence=32", "batch.global=4",
    "batch.micro=null", f"steps={STEPS}", "log.every=2", "log.refs=true", "log.console=false",
    "checkpoint.every=2", "checkpoint.keep_last=2",
    "~evals", "ema={decay: 0.9}", "parallel.precision=fp64",
]  # fmt: skip


CONFIG = RunConfig.from_file(ROOT / "configs/experiment/llm.yaml", LLM).to_dict()


def _train(
    folder: Path,
    rank: int,
    world_size: int,
    store: str,
    kill: tuple[str, int] | None,
    config: dict[str, Any],
    fault: Callable[[], None] | None,
) -> None:
    """One process of a run, forked; with ``kill = (point, n)`` it dies when it passes the point for the n-th time; ``fault``
    changes the program first."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    report.write_report = lambda *args, **kwargs: None  # drawing the curves is not what is tested, and slow
    passed = 0

    def reached(point: str) -> None:
        nonlocal passed
        if kill is not None and point == kill[0]:
            passed += 1
            if passed == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.on_point = reached
    step = updates.Update.step

    def counted(self: Any, *args: Any) -> Any:
        reached("mid_step")
        return step(self, *args)

    updates.Update.step = counted  # type: ignore[method-assign]
    if fault is not None:
        fault()
    train.train(RunConfig.from_dict(config | {"run": {"dir": str(folder), "name": "llm"}}))


def _entry(*args: Any) -> None:
    try:
        _train(*args)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as a process that ends, without the destructors of a group whose peers may be gone


def launch(
    folder: Path,
    world_size: int = 1,
    kill: tuple[str, int] | None = None,
    ranks: tuple[int, ...] = (),
    after: float | None = None,
    config: dict[str, Any] = CONFIG,
    fault: Callable[[], None] | None = None,
) -> bool:
    """Run the command once; True if it came to its end. As a launcher does, the other ranks are killed when one has died."""
    context = clean_forks()
    with tempfile.TemporaryDirectory() as place:
        store = os.path.join(place, "store")
        jobs = [
            context.Process(target=_entry, args=(folder, rank, world_size, store, kill if rank in ranks else None, config, fault))
            for rank in range(world_size)
        ]
        began = time.monotonic()
        for job in jobs:
            job.start()
        while any(job.is_alive() for job in jobs):
            dead = any(job.exitcode not in (None, 0) for job in jobs)
            if dead or (after is not None and time.monotonic() - began > after):
                if dead and len(ranks) != world_size:
                    time.sleep(0.2)  # the others wait for the dead one for a while
                for job in jobs:
                    job.kill()
            time.sleep(0.01)
        codes = [job.exitcode for job in jobs]
        for job in jobs:
            job.join()
    # a rank whose peer was killed may end by the error of the connection that broke; nothing else may fail
    assert all(code in (0, -signal.SIGKILL) for code in codes) or -signal.SIGKILL in codes, codes
    return all(code == 0 for code in codes)


def history(folder: Path) -> list[tuple[int, float, float, list[str]]]:
    lines = [json.loads(line) for line in (folder / "llm" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["refs"]) for line in lines if "refs" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    found = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{world_size}")
        assert launch(folder, world_size)
        found[world_size] = history(folder)
        assert [row[0] for row in found[world_size]] == list(range(1, STEPS + 1))
    return found


#: only rank 0 gets there
MAIN_ONLY = ("before_marker", "between_marker_and_latest", "during_pruning")


@pytest.mark.parametrize(
    ("ranks", "point"),
    [
        *(((0,), point) for point in POINTS),
        ((1,), "mid_write"),
        *(pytest.param((1,), p, marks=pytest.mark.slow) for p in POINTS if p not in (*MAIN_ONLY, "mid_write")),
        *(pytest.param((0, 1), point, marks=pytest.mark.slow) for point in POINTS),
    ],
    ids=str,
)
def test_killed_at(ranks: tuple[int, ...], point: str, uninterrupted: dict[int, list[Any]], tmp_path: Path) -> None:
    """``ranks`` die there: the one there is, the second of two, or both."""
    world_size = 1 if ranks == (0,) else 2
    times = {"mid_step": 5, "during_pruning": 1}.get(point, 2)
    assert not launch(tmp_path, world_size, (point, times), ranks)
    assert launch(tmp_path, world_size)
    assert history(tmp_path) == uninterrupted[world_size]  # bitwise: losses, norms and samples


def test_killed_at_random_moments(uninterrupted: dict[int, list[Any]], tmp_path: Path) -> None:
    draw = random.Random(7)
    kills = 0
    for _ in range(10):
        if launch(tmp_path, after=draw.uniform(0.2, 1.6)):
            break
        kills += 1
    assert kills >= 3
    assert launch(tmp_path)
    assert history(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize(("before", "then"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_killed_and_relaunched_on_another_mesh(
    before: int, then: int, uninterrupted: dict[int, list[Any]], tmp_path: Path
) -> None:
    assert not launch(tmp_path, before, ("mid_step", 6), tuple(range(before)))
    assert launch(tmp_path, then)
    for ours, whole in zip(history(tmp_path), uninterrupted[1], strict=True):
        assert (ours[0], ours[3]) == (whole[0], whole[3])
        assert ours[1] == pytest.approx(whole[1], rel=1e-8) and ours[2] == pytest.approx(whole[2], rel=1e-8)


def other_data(kind: str, folder: Path) -> dict[str, Any]:
    """The same run on a mixture of an index and a stream in fitted packs, on token files, or on shuffled shards."""
    words = [{"text": f"line {n} " * (n % 6 + 1)} for n in range(60)]
    for name in ("a", "b", "c"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    data = "l3m_like.data."
    tokens = {"_target_": data + "Tokenize", "vocab_size": 257}
    stream = {"_target_": data + "JsonLinesStream", "path": str(folder / "{a,b,c}.jsonl")}
    fit = {"_target_": data + "FitPack", "length": 32, "buffer": 6, "too_long": "split"}
    if kind == "mixture":
        index = {"_target_": data + "JsonLines", "path": str(folder / "a.jsonl")}
        mix = {"_target_": data + "Mix", "weights": {"index": 2, "stream": 1}}
        parts: dict[str, Any] = {"source": {"index": index, "stream": stream}, "process": tokens, "pack": fit, "mix": mix}
    elif kind == "stream":
        parts = {"source": stream, "process": tokens, "pack": {"_target_": data + "ConcatPack", "length": 32}, "block": 5}
    else:
        with MegatronWriter(str(folder / "tokens"), vocab_size=257) as writer:
            for word in words:
                writer.add(np.frombuffer(word["text"].encode(), dtype=np.uint8))
        source = {"_target_": data + "Megatron", "path": str(folder / "tokens")}
        parts = {"source": source, "process": {"_target_": data + "TokenIds", "vocab_size": 257}, "pack": fit}
    train_on = {"_target_": data + "Dataset", **parts}
    return CONFIG | {"data": {"workers": 2, "train": train_on}}


@pytest.mark.parametrize("kind", ["mixture", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("stream", "megatron"))])
def test_any_data_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    """Killed in a step, and continued on the same and on another number of processes."""
    config = other_data(kind, tmp_path)
    for name in ("whole", "same", "other"):
        (tmp_path / name).mkdir()
    assert launch(tmp_path / "whole", 1, config=config)
    whole = history(tmp_path / "whole")
    assert not launch(tmp_path / "same", 1, ("mid_step", 6), (0,), config=config)
    assert launch(tmp_path / "same", 1, config=config)
    assert history(tmp_path / "same") == whole
    assert not launch(tmp_path / "other", 2, ("mid_step", 6), (1,), config=config)
    assert launch(tmp_path / "other", 1, config=config)
    for ours, theirs in zip(history(tmp_path / "other"), whole, strict=True):
        assert (ours[0], ours[3]) == (theirs[0], theirs[3]) and ours[1] == pytest.approx(theirs[1], rel=1e-8)


#: the discriminator learns from step 2 on, and the decoder from it. Saves end before the next step, so that one is there
AUTOENCODER = experiment(
    "rae",
    **{
        "steps": 4,
        "precision": "fp32",
        "log.refs": True,
        "optim.weight_decay": 0.1,
        "model.decoder.head.perceptual.model.smallest": 63,
        "checkpoint.every": 2,
        "checkpoint.keep_last": 1,
        "checkpoint.asynchronous": False,
    },
).to_dict()
State = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def state_of(folder: Path) -> State:
    """What was logged of each step but times, and every tensor of the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "llm" / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "data_wait", "images_per_second")
    steps = [{name: value for name, value in line.items() if name not in timed} for line in lines if "refs" in line]
    return steps, checkpoint.load_full(folder / "llm" / "checkpoints", 4)


def differences(folder: Path, expected: State) -> list[str]:
    steps, tensors = state_of(folder)
    assert set(tensors) == set(expected[1])
    found = [name for name, value in tensors.items() if not torch.equal(value, expected[1][name])]
    return found if steps == expected[0] else ["metrics.jsonl", *found]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> State:
    folder = tmp_path_factory.mktemp("autoencoder")
    assert launch(folder, 2, config=AUTOENCODER)
    steps, tensors = state_of(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and all({"loss/fool", "loss/tell"} <= set(line) for line in steps[1:])
    for start in ("model/decoder.", "model/critic.", "optim/decoder/", "optim/critic/", "ema/decoder.", "ema/critic."):
        assert any(name.startswith(start) for name in tensors), start
    assert any(name.endswith(".u") for name in tensors), "the vectors of spectral norm"
    return steps, tensors


@pytest.mark.slow  # half a minute each; tests/training/test_rae.py stops and goes on in every run of the tests
@pytest.mark.parametrize(
    ("point", "times", "ranks"),
    [
        ("mid_step", 7, (1,)),  # in step 4, between the step of the decoder and that of the discriminator
        ("mid_step", 6, (0, 1)),  # in step 4, before the decoder's
        ("mid_step", 3, (0,)),  # in step 2, the first with a discriminator
        *((point, 2, (0,)) for point in POINTS[:4]),  # of the save after step 4
        *((point, 1, (0, 1)) for point in POINTS[:2]),  # of the save after step 2
        ("during_pruning", 1, (0,)),
    ],
)
def test_an_autoencoder_and_its_discriminator(
    point: str, times: int, ranks: tuple[int, ...], autoencoder: State, tmp_path: Path
) -> None:
    """Bitwise: the parameters of both, both optimizers, averages, spectral vectors; every logged number, so every draw too."""
    assert not launch(tmp_path, 2, (point, times), ranks, config=AUTOENCODER)
    assert launch(tmp_path, 2, config=AUTOENCODER)
    assert not differences(tmp_path, autoencoder)


def forget(start: str) -> None:
    """The planted fault: what a checkpoint holds under names that begin so is lost when it is loaded."""
    resume = train.resume

    def forgetful(checkpointer: Any, where: str, tensors: Any) -> Any:
        saved = resume(checkpointer, where, tensors)
        lost = [tensor for name, tensor in tensors.items() if name.startswith(start)]
        assert lost, start
        for tensor in lost:
            tensor.zero_()
        return saved

    train.resume = forgetful


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["optim/critic/", "optim/decoder/", "model/critic.head.network.score.u", "ema/decoder."])
def test_lost_state_of_an_autoencoder_is_seen(lost: str, autoencoder: State, tmp_path: Path) -> None:
    assert not launch(tmp_path, 2, ("mid_step", 7), (1,), config=AUTOENCODER)
    assert launch(tmp_path, 2, config=AUTOENCODER, fault=functools.partial(forget, lost))
    assert differences(tmp_path, autoencoder)


def test_a_lost_step_is_seen(uninterrupted: dict[int, list[Any]], tmp_path: Path) -> None:
    """The planted fault: a resume that forgets the data's state repeats samples, and the comparison finds it."""
    assert not launch(tmp_path, kill=("mid_step", 6), ranks=(0,))
    folder = tmp_path / "llm" / "checkpoints"
    step = checkpoint.whole_steps(folder)
    first = next(iter(step))
    state_file = folder / f"step_{first:08d}" / "state.json"
    state = json.loads(state_file.read_text())
    for lane in state["data"].values():
        lane["pack"]["offset"] = 0
    text = json.dumps(state)
    marker = folder / f"step_{first:08d}" / "COMMITTED"
    known = json.loads(marker.read_text())
    state_file.write_text(text)
    _recommit(marker, known, state_file)
    assert launch(tmp_path)
    assert history(tmp_path) != uninterrupted[1]


def _recommit(marker: Path, known: dict[str, Any], changed: Path) -> None:
    """Rewrite the marker so that the changed file counts as whole."""
    text = json.dumps(known)
    old = json.loads(text)
    for section in old.values():
        if isinstance(section, dict) and changed.name in section:
            value = section[changed.name]
            section[changed.name] = changed.stat().st_size if isinstance(value, int) else checkpoint._sha256(changed)
    marker.write_text(json.dumps(old))
