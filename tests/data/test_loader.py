"""Lanes and loaders: the stream depends on the data, the seed, the global batch and the lanes, and on nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.core.keys import KeySpec
from l3m_like.data import ConcatPack, Dataset, EvalLoader, JsonLines, Loader, Stack, Tokenize
from l3m_like.data.lanes import Order, default_lanes

GLOBAL = 8
STEPS = 9  # some lanes cross the first epoch's end at step 3


class Numbers:
    """Samples {"value": index, "draw": uniform of the visit}: one row each."""

    path = "numbers"

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> dict[str, Any]:
        if index == 1000:
            raise ValueError("broken")
        return {"value": index}

    def reference(self, index: int) -> str:
        return f"numbers#{index}"


class Draw:
    def keys(self) -> dict[str, KeySpec]:
        return {"value": KeySpec(torch.int64, ()), "draw": KeySpec(torch.float64, ())}

    def check(self) -> None: ...

    def __call__(self, sample: dict[str, Any], visit: Any) -> dict[str, np.ndarray]:
        return {"value": np.array(sample["value"]), "draw": np.array(visit.uniform("draw"))}


def numbers(samples: int = 21) -> Dataset:
    return Dataset(Numbers(samples), Draw(), Stack())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """40 documents of 0 to 60 bytes, in rows of 32 tokens with at most 3 documents."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    sizes = np.random.default_rng(0).integers(0, 60, 40)
    path.write_text("".join(json.dumps({"text": chr(65 + i % 50) * int(n)}) + "\n" for i, n in enumerate(sizes)))
    return Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(32, max_documents=3))


def run(dataset: Dataset, steps: int, *, dp: int = 1, accumulation: int = 1, workers: int = 0, state=None, **kwargs) -> dict:
    """The global stream: {key: [steps * GLOBAL, ...]}, "refs", and "state" merged after each step."""
    loaders = [
        Loader(
            dataset,
            seed=7,
            global_batch=GLOBAL,
            micro_batch=GLOBAL // dp // accumulation,
            dp_rank=rank,
            dp_size=dp,
            workers=workers,
            state=state,
            prefetch=2 if workers else 0,
            **kwargs,
        )
        for rank in range(dp)
    ]
    stream: dict[str, list] = {"refs": [], "state": []}
    for _ in range(steps):
        parts = [loader.next_step() for loader in loaders]
        merged: dict[str, Any] = {}
        for part in parts:
            assert len(part.micro) == accumulation
            merged |= part.state
            stream["refs"] += part.refs
            for batch in part.micro:
                for key, value in batch.items():
                    if key != "text_cu_seqlens":
                        stream.setdefault(key, []).append(value)
        stream["state"].append(json.loads(json.dumps(merged)))
    for loader in loaders:
        loader.close()
    return {key: torch.cat(value) if isinstance(value[0], torch.Tensor) else value for key, value in stream.items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("kind", ["numbers", "text"])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_stream_is_the_same_on_any_split(kind: str, dp: int, accumulation: int, workers: int, text: Dataset) -> None:
    dataset = numbers() if kind == "numbers" else text
    reference = run(dataset, STEPS)
    assert torch.equal(reference["row"], torch.arange(STEPS * GLOBAL))
    assert_same(reference, run(dataset, STEPS, dp=dp, accumulation=accumulation, workers=workers))


@pytest.mark.parametrize("kind", ["numbers", "text"])
@pytest.mark.parametrize(("before", "after"), [((1, 1, 0), (4, 2, 3)), ((4, 1, 3), (2, 1, 0)), ((2, 2, 3), (1, 1, 2))])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resume_on_another_split(kind: str, stop: int, before: tuple, after: tuple, text: Dataset) -> None:
    dataset = numbers() if kind == "numbers" else text
    whole = run(dataset, STEPS)
    first = run(dataset, stop, dp=before[0], accumulation=before[1], workers=before[2])
    rest = run(dataset, STEPS - stop, dp=after[0], accumulation=after[1], workers=after[2], state=first["state"][-1])
    joined = {k: torch.cat([first[k], rest[k]]) if isinstance(v, torch.Tensor) else first[k] + rest[k] for k, v in first.items()}
    assert_same(whole, joined)


def test_the_test_sees_a_wrong_state(text: Dataset) -> None:
    """Planted fault: a state that forgets the carried tail gives another stream."""
    whole = run(text, STEPS)
    state = whole["state"][2]
    assert any(lane["offset"] for lane in state.values())
    broken = {number: lane | {"offset": 0} for number, lane in state.items()}
    rest = run(text, STEPS - 3, state=broken)
    assert not torch.equal(whole["text_ids"][3 * GLOBAL :], rest["text_ids"])


def test_state_is_of_the_step_handed_out_not_of_the_prefetched() -> None:
    loader = Loader(numbers(), seed=7, global_batch=GLOBAL, micro_batch=GLOBAL, prefetch=4)
    assert [loader.next_step().state["0"]["sample"] for _ in range(4)] == [1, 2, 3, 4]
    loader.close()


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    values = run(numbers(24), 6)["value"]
    first, second = values[:24], values[24:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))
    assert first.tolist() != list(range(24)) and first.tolist() != second.tolist()


def test_order_is_fixed_for_ever() -> None:
    """The same numbers on every machine and version: a change here breaks every saved run."""
    assert Order(8, seed=0).permutation(0).tolist() == [2, 6, 5, 7, 4, 3, 0, 1]
    order = Order(5, seed=1)
    first = order.permutation(0).tolist()
    for epoch in range(6):
        order.permutation(epoch)
    assert order.permutation(0).tolist() == first  # after it was dropped from memory


def test_draws_belong_to_sample_and_epoch() -> None:
    stream = run(numbers(24), 6)
    draws = {(int(v), i // 24): float(d) for i, (v, d) in enumerate(zip(stream["value"], stream["draw"], strict=True))}
    assert len(set(draws.values())) == 48  # no two visits share a draw


# ---- packing -----------------------------------------------------------------------------------------------------------


def documents_of(dataset: Dataset) -> list[list[int]]:
    return [dataset.item(index).data["ids"].tolist() for index in range(len(dataset))]


def check_rows(batch: dict[str, torch.Tensor], max_documents: int) -> None:
    """ids, targets, positions, document_ids and cu_seqlens say the same."""
    ids, targets, positions, documents = (batch[f"text_{k}"] for k in ("ids", "targets", "positions", "document_ids"))
    rows, length = ids.shape
    borders = batch["text_cu_seqlens"]
    assert borders.shape == (rows * (max_documents + 1) + 1,) and borders.dtype == torch.int32
    assert borders[0] == 0 and borders[-1] == rows * length and (borders.diff() >= 0).all()
    real = borders[: int((borders < rows * length).sum())].tolist()
    expected = []
    for row in range(rows):
        for at in range(length):
            begins = at == 0 or documents[row, at] != documents[row, at - 1]
            if begins:
                expected.append(row * length + at)
            if documents[row, at] < 0:
                assert targets[row, at] == -100
                continue
            assert positions[row, at] == (0 if begins else positions[row, at - 1] + 1)
            ends = at + 1 == length or documents[row, at + 1] != documents[row, at]
            if not ends:
                assert targets[row, at] == ids[row, at + 1]
            elif at + 1 < length:
                assert targets[row, at] == -100
            if ids[row, at] == 256:
                assert targets[row, at] == -100 and ends
    assert real == expected


def test_an_epoch_of_packs_loses_no_byte(text: Dataset) -> None:
    rows = [batch for batch, _ in EvalLoader(text, batch=5)]
    ids = torch.cat([b["text_ids"] for b in rows]).flatten()
    kept = torch.cat([b["text_document_ids"] for b in rows]).flatten() >= 0
    everything = [token for document in documents_of(text) for token in document]
    assert ids[kept].tolist() == everything
    targets = torch.cat([b["text_targets"] for b in rows]).flatten()
    assert targets[targets != -100].tolist() == [token for document in documents_of(text) for token in document[1:]]
    for batch in rows:
        check_rows(batch, 3)


def test_lanes_lose_no_byte_and_rows_are_consistent(text: Dataset) -> None:
    """Each lane's tokens are its documents in order, across rows and epochs."""
    stream = run(text, STEPS)
    order, documents = Order(len(text), 7), documents_of(text)
    for lane in range(GLOBAL):
        rows = slice(lane, None, GLOBAL)
        tokens = stream["text_ids"][rows].flatten()[stream["text_document_ids"][rows].flatten() >= 0].tolist()
        expected: list[int] = []
        for k in range(100):
            expected += documents[order(lane + k * GLOBAL)[1]]
        assert tokens == expected[: len(tokens)]
    loader = Loader(text, seed=7, global_batch=GLOBAL, micro_batch=4)
    for batch in loader.next_step().micro:
        check_rows(batch, 3)
    loader.close()


def test_targets_never_cross_documents(tmp_path: Path) -> None:
    """Every document is one letter, so a target of another letter crossed a border."""
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 45}) + "\n" for letter in "abcdefgh"))
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(32))
    stream = run(dataset, 5)
    ids, targets = stream["text_ids"], stream["text_targets"]
    counted = targets != -100
    assert ((targets == ids) | (targets == 256) | ~counted).all()
    assert (ids[counted] != 256).all()
    crossing = torch.roll(ids, -1, dims=1)  # planted fault: targets shifted across borders
    assert not ((crossing == ids) | (crossing == 256))[:, :-1].all()


def test_a_row_with_too_many_documents_is_padded(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "ab"}\n' * 9)
    dataset = Dataset(JsonLines(str(path)), Tokenize("bytes", vocab_size=257), ConcatPack(16, max_documents=2))
    batch = next(iter(EvalLoader(dataset, batch=9)))[0]
    assert batch["text_ids"].shape == (5, 16)
    assert batch["text_document_ids"][0].tolist() == [0] * 3 + [1] * 3 + [-1] * 10
    assert batch["text_cu_seqlens"].tolist() == [0, 3, 6, 16, 19, 22, 32, 35, 38, 48, 51, 54, 64, 67] + [80] * 2
    check_rows(batch, 2)


# ---- finite data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_finite_data_ends_at_the_same_step_on_all_ranks(dp: int, text: Dataset) -> None:
    for dataset in (numbers(27), text):
        ends = []
        for rank in range(dp):
            loader = Loader(dataset, seed=0, global_batch=GLOBAL, micro_batch=2, dp_rank=rank, dp_size=dp, epochs=3, workers=2)
            refs = []
            while (step := loader.next_step()) is not None:
                refs += step.refs
            ends.append((loader.number, loader.total_steps))
            assert loader.next_step() is None
            loader.close()
        assert len(set(ends)) == 1 and ends[0][0] == ends[0][1] > 0
        if dataset is not text:
            assert ends[0][0] == 27 * 3 // GLOBAL


def test_finite_packs_use_no_sample_more_often_than_epochs(text: Dataset) -> None:
    loader = Loader(text, seed=0, global_batch=GLOBAL, micro_batch=GLOBAL, epochs=1)
    tokens = 0
    for _ in range(loader.total_steps):
        step = loader.next_step()
        tokens += int((step.micro[0]["text_document_ids"] >= 0).sum())
        assert all(lane["sample"] * GLOBAL + int(number) <= len(text) + GLOBAL for number, lane in step.state.items())
    total = sum(len(document) for document in documents_of(text))
    assert 0 < tokens <= total
    loader.close()


@pytest.mark.parametrize("kind", ["numbers", "text"])
@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_eval_covers_every_row_once_and_ranks_stay_together(kind: str, dp: int, text: Dataset) -> None:
    dataset = numbers(23) if kind == "numbers" else text
    whole = [batch for batch, valid in EvalLoader(dataset, batch=4) if valid]
    ranks = [list(EvalLoader(dataset, batch=4, dp_rank=rank, dp_size=dp)) for rank in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [batches[turn] for turn in range(len(ranks[0])) for batches in ranks]
    valid = [batch for batch, is_valid in dealt if is_valid]
    assert len(valid) == len(whole)
    for one, other in zip(whole, valid, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.cat([batch["row"] for batch in valid]).tolist() == list(range(sum(len(batch["row"]) for batch in whole)))


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (3, 2)])
def test_a_bad_sample_surfaces_with_its_reference(workers: int, prefetch: int) -> None:
    loader = Loader(numbers(1001), seed=0, global_batch=100, micro_batch=100, workers=workers, prefetch=prefetch)
    with pytest.raises(UserError, match=r"^numbers#1000: ValueError: broken"):
        for _ in range(11):
            loader.next_step()
    with pytest.raises(UserError, match="numbers#1000"):  # and again: the stream has ended there
        loader.next_step()
    loader.close()


def test_close_ends_all_threads() -> None:
    before = set(threading.enumerate())
    loader = Loader(numbers(), seed=0, global_batch=8, micro_batch=8, workers=3)
    loader.next_step()
    assert set(threading.enumerate()) > before
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(UserError, match="closed"):
        loader.next_step()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_batch": 30, "micro_batch": 4, "dp_size": 4}, ["batch.global is 30", "batch.micro 4 x 4", "16 or 32"]),
        ({"global_batch": 32, "micro_batch": 3, "dp_size": 4}, ["batch.global is 32", "24 or 36", "batch.micro 2 or 4"]),
        ({"global_batch": 4, "micro_batch": 4, "dp_size": 2}, ["batch.global is 4", "global 8", "batch.micro 1 or 2"]),
        ({"global_batch": 16, "micro_batch": 4, "lanes": 3}, ["data.lanes is 3", "2, 4"]),
        ({"global_batch": 16, "micro_batch": 4, "dp_size": 4, "lanes": 2}, ["data.lanes is 2", "4, 8, 16"]),
        ({"global_batch": 16, "micro_batch": 4, "epochs": 0}, ["epochs is 0"]),
    ],
)
def test_bad_numbers(arguments: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Loader(numbers(), seed=0, **arguments)
    for word in words:
        assert word in str(error.value)


def test_bad_states() -> None:
    state = run(numbers(), 2)["state"][-1]
    make = {"seed": 7, "global_batch": 8, "micro_batch": 8}
    with pytest.raises(UserError, match="8 lanes, but data.lanes is 4.*Set data.lanes: 8"):
        Loader(numbers(), **make, lanes=4, state=state)
    with pytest.raises(UserError, match="another stream"):
        Loader(numbers(22), **make, state=state)
    with pytest.raises(UserError, match="another stream"):
        Loader(numbers(), **(make | {"seed": 8}), state=state)
    with pytest.raises(UserError, match="different steps"):
        Loader(numbers(), **make, state=state | {"0": state["0"] | {"rows": 3}})
    with pytest.raises(UserError, match="no whole step"):
        Loader(numbers(), **(make | {"global_batch": 24, "micro_batch": 24}), lanes=8, state=state)


def test_default_lanes() -> None:
    assert [default_lanes(n) for n in (1, 16, 64, 256, 1000, 1024, 257)] == [1, 16, 64, 256, 250, 256, 1]
