"""Checkpoints: what comes back, what is noticed, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from l3m_like.core.errors import UserError
from l3m_like.training import checkpoint
from l3m_like.training.checkpoint import Checkpointer, DamagedCheckpoint, damage, load_full

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is an ordinary case
DRIVER = Path(__file__).with_name("checkpoint_driver.py")


@pytest.fixture(autouse=True)
def no_points():
    yield
    checkpoint.on_point = None


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(16, 8, generator=g),
        "model/bias": torch.randn(8, generator=g).bfloat16(),
        "optim/weight/step": torch.tensor(float(seed)),
        "count": torch.randint(0, 9, (3,), generator=g),
        "empty": torch.empty(0, 4),
    }


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def saved(folder: Path, *steps: int, **settings) -> Checkpointer:
    checkpointer = Checkpointer(folder, **{"keep_last": 10} | settings)
    for step in steps:
        checkpointer.save(step, tensors(step), {"step": step})
    checkpointer.wait()
    return checkpointer


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    state = {"lanes": [1, 2.5, None, {"a": True}], "tiny": 5e-324, "third": 1 / 3, "inf": float("inf")}
    checkpointer = Checkpointer(tmp_path / "deep" / "checkpoints", asynchronous=asynchronous)
    assert checkpointer.latest() is None
    assert checkpointer.resume(blank()) is None
    checkpointer.save(7, tensors(7), state)
    checkpointer.wait()
    here = blank()
    fresh = Checkpointer(tmp_path / "deep" / "checkpoints")
    assert fresh.latest() == 7
    assert fresh.load(7, here) == state
    assert equal(here, tensors(7))
    assert json.loads((path_of(tmp_path / "deep" / "checkpoints", 7) / "state.json").read_text()) == state


def test_what_is_saved_is_what_was_there_when_save_was_called(tmp_path):
    live, state = tensors(1), {"list": [1]}
    checkpointer = Checkpointer(tmp_path)
    gate = threading.Event()
    checkpoint.on_point = lambda point: gate.wait(10) if point == "mid_write" else None
    checkpointer.save(1, live, state)
    for tensor in live.values():
        tensor.zero_()  # the next step changes weights and state in place while the save runs
    state["list"].append(2)
    assert not (path_of(tmp_path, 1) / "COMMITTED").exists()
    gate.set()
    checkpointer.wait()
    assert equal(load_full(tmp_path, 1), tensors(1))
    assert json.loads((path_of(tmp_path, 1) / "state.json").read_text()) == {"list": [1]}


def test_load_full_whole_and_by_name(tmp_path):
    saved(tmp_path, 3, 5)
    assert equal(load_full(tmp_path), tensors(5))
    assert equal(load_full(tmp_path, 3, ["model/bias"]), {"model/bias": tensors(3)["model/bias"]})
    with pytest.raises(UserError, match="no tensor 'model/bais'. Did you mean 'model/bias'"):
        load_full(tmp_path, 3, ["model/bais"])
    with pytest.raises(DamagedCheckpoint, match="holds no checkpoint"):
        load_full(tmp_path / "nothing")


def test_torch_tools_can_read_it(tmp_path):
    saved(tmp_path, 3)
    here = blank()
    dcp.load(here, checkpoint_id=str(path_of(tmp_path, 3)))
    assert equal(here, tensors(3))


def test_nothing_is_unpickled_but_tensors(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 3)
    (path_of(tmp_path, 3) / ".metadata").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that runs a command
    here = blank()

    def refuse(*args, **kwargs):
        raise AssertionError("pickle.load on a load path")

    monkeypatch.setattr(pickle, "load", refuse)
    checkpointer.load(3, here)
    assert equal(here, tensors(3))


# ---- names, shapes, bad input ------------------------------------------------------------------------------------------


def test_names_must_match_both_ways(tmp_path):
    checkpointer = saved(tmp_path, 3)
    here = blank()
    here["model/wieght"] = here.pop("model/weight")
    with pytest.raises(UserError) as error:
        checkpointer.load(3, here)
    assert "holds no 'model/wieght'. Did you mean 'model/weight'?" in str(error.value)
    assert "holds 'model/weight', which this run has not. Did you mean 'model/wieght'?" in str(error.value)
    few = {"model/bias": torch.zeros(8, dtype=torch.bfloat16)}
    with pytest.raises(UserError, match="which this run has not"):
        checkpointer.load(3, few)
    checkpointer.load(3, few, partial=True)
    assert torch.equal(few["model/bias"], tensors(3)["model/bias"])
    with pytest.raises(UserError, match="holds no 'other'"):
        checkpointer.load(3, {"other": torch.zeros(1)}, partial=True)


def test_shapes_and_dtypes_must_match(tmp_path):
    checkpointer = saved(tmp_path, 3)
    here = blank() | {"model/weight": torch.zeros(8, 16), "model/bias": torch.zeros(8)}
    with pytest.raises(UserError) as error:
        checkpointer.load(3, here)
    assert "'model/weight' is [16, 8] there and [8, 16] here" in str(error.value)
    assert "'model/bias' is torch.bfloat16 there and torch.float32 here" in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lanes": {1: 2}}, "state.lanes: the key 1"),
        ({"a": [0, (1, 2)]}, "state.a.1: a tuple"),
        ({"t": torch.ones(1)}, "state.t: a Tensor"),
    ],
)
def test_state_that_would_come_back_different_is_refused(tmp_path, state, message):
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path).save(1, tensors(), state)


def test_settings_out_of_range(tmp_path):
    with pytest.raises(UserError, match="keep_last: 0"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="keep_every: 0"):
        Checkpointer(tmp_path, keep_every=0)


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "data truncated": lambda p: truncate(p / "__0_0.distcp"),
    "data removed": lambda p: (p / "__0_0.distcp").unlink(),
    "data longer": lambda p: os.truncate(p / "__0_0.distcp", (p / "__0_0.distcp").stat().st_size + 1),
    "index changed": lambda p: (p / "index.json").write_text((p / "index.json").read_text().replace("16", "17", 1)),
    "state changed": lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace("20", "21", 1)),
    "no marker": lambda p: (p / "COMMITTED").unlink(),
    "half a marker": lambda p: os.truncate(p / "COMMITTED", 20),
    "empty": lambda p: [file.unlink() for file in p.iterdir()],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_and_skipped_with_a_message(tmp_path, what, caplog):
    saved(tmp_path, 10, 20)
    assert damage(path_of(tmp_path, 20)) is None
    DAMAGE[what](path_of(tmp_path, 20))
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest() == 10
    assert "skipping the checkpoint" in caplog.text and "step_00000020" in caplog.text
    with pytest.raises(DamagedCheckpoint, match="step_00000020 cannot be used: .*Whole ones: steps 10"):
        checkpointer.load(20, blank())
    with pytest.raises(DamagedCheckpoint):
        load_full(tmp_path, 20)
    here = blank()
    assert checkpointer.resume(here) == (10, {"step": 10})
    assert equal(here, tensors(10))


def test_a_flipped_bit_is_noticed_in_reading(tmp_path, caplog):
    saved(tmp_path, 10, 20)
    file = path_of(tmp_path, 20) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.find(tensors(20)["model/weight"].numpy().tobytes())
    assert at > 0
    data[at + 5] ^= 1
    file.write_bytes(data)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="step_00000020 cannot be read"):
        checkpointer.load(20, blank())
    here = blank()
    assert checkpointer.resume(here) == (10, {"step": 10})
    assert equal(here, tensors(10)) and "step_00000020 cannot be read" in caplog.text


def test_no_whole_checkpoint_left_is_an_error_not_a_new_start(tmp_path):
    saved(tmp_path, 10, 20)
    for step in (10, 20):
        truncate(path_of(tmp_path, step) / "__0_0.distcp")
    with pytest.raises(UserError, match="not one is whole"):
        Checkpointer(tmp_path).latest()


def test_missing_checkpoint_names_those_that_are_there(tmp_path):
    checkpointer = saved(tmp_path, 10, 20)
    with pytest.raises(DamagedCheckpoint, match="does not exist.*steps 10, 20"):
        checkpointer.load(15, blank())


# ---- retention and histories -------------------------------------------------------------------------------------------


def test_retention(tmp_path):
    saved(tmp_path, *range(1, 12), keep_last=2, keep_every=5)
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [f"step_{s:08d}" for s in (5, 10, 11)]
    assert (tmp_path / "latest").read_text() == "11\n"


def test_a_step_is_saved_again_after_resuming_from_an_earlier_one(tmp_path, caplog):
    saved(tmp_path, 10, 20, 30)
    checkpointer = Checkpointer(tmp_path, keep_last=10)
    checkpointer.load(10, blank())
    checkpointer.save(20, tensors(99), {"step": 99})
    checkpointer.wait()
    assert equal(load_full(tmp_path, 20), tensors(99))
    # step 30 is of the history that was left: it must not be resumed from, nor be lost
    assert Checkpointer(tmp_path).latest() == 20
    assert (tmp_path / "step_00000030.abandoned" / "COMMITTED").exists() and "renamed" in caplog.text


def test_the_only_checkpoint_is_never_rewritten_by_the_process_that_holds_it(tmp_path):
    checkpointer = saved(tmp_path, 10, keep_last=1)
    before = (path_of(tmp_path, 10) / "COMMITTED").stat().st_mtime_ns
    checkpointer.save(10, tensors(10), {"step": 10})
    checkpointer.wait()
    again = Checkpointer(tmp_path, keep_last=1)
    again.load(10, blank())
    again.save(10, tensors(10), {"step": 10})  # e.g. SIGTERM right after a resume
    again.wait()
    assert (path_of(tmp_path, 10) / "COMMITTED").stat().st_mtime_ns == before


def test_cleaning_finishes_what_a_kill_left(tmp_path):
    saved(tmp_path, 10, 20, 30)
    (path_of(tmp_path, 10) / "COMMITTED").unlink()  # pruning half done
    (tmp_path / "latest").write_text("20\n")  # killed between the marker of 30 and `latest`
    path_of(tmp_path, 40).mkdir()
    reader = Checkpointer(tmp_path, keep_last=1)
    reader.load(20, blank())
    assert path_of(tmp_path, 10).exists() and path_of(tmp_path, 40).exists()  # a live run may be saving there
    reader.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000020", "step_00000030"]


def test_a_failed_save_is_raised_and_leaves_the_last_one(tmp_path, monkeypatch):
    checkpointer = saved(tmp_path, 10)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint._Writer, "finish", full)
    checkpointer.save(20, tensors(20), {})
    with pytest.raises(UserError, match="could not be saved .*No space left on device"):
        checkpointer.wait()
    monkeypatch.undo()
    assert Checkpointer(tmp_path).latest() == 10
    checkpointer.save(30, tensors(30), {})
    checkpointer.wait()
    assert Checkpointer(tmp_path).latest() == 30


def test_order_of_a_save(tmp_path):
    """At each point, what is on disk already and what is not."""
    seen = {}

    def look(point: str) -> None:
        if point == "during_pruning":
            seen[point] = (path_of(tmp_path, 1) / "COMMITTED").exists(), path_of(tmp_path, 1).exists()
        else:
            latest = (tmp_path / "latest").read_text() if (tmp_path / "latest").exists() else None
            seen[point] = path_of(tmp_path, 2).exists(), (path_of(tmp_path, 2) / "COMMITTED").exists(), latest

    checkpointer = saved(tmp_path, 1, keep_last=1)
    checkpoint.on_point = look
    checkpointer.save(2, tensors(2), {})
    checkpointer.wait()
    assert seen == {
        "staging": (False, False, "1\n"),
        "mid_write": (True, False, "1\n"),
        "before_marker": (True, False, "1\n"),
        "between_marker_and_latest": (True, True, "1\n"),
        "during_pruning": (False, True),
    }
    assert set(seen) == set(checkpoint.POINTS)


# ---- kills -------------------------------------------------------------------------------------------------------------

POINTS = ("mid_step", *checkpoint.POINTS)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """``do(name, *launches)``: run a job, and return what became of it."""
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), str(tmp_path_factory.mktemp("kills"))],
        env=os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def do(name: str, *launches: dict) -> dict:
        process.stdin.write(json.dumps({"name": name, "launches": launches}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield do
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def whole(driver) -> dict:
    """The run that nothing interrupts."""
    return driver("whole", {"world": 1})


def check(answer: dict, whole: dict) -> None:
    """The last launch ended well, and the run shows one history: the uninterrupted one, bitwise."""
    assert set(answer["launches"][-1]["codes"]) == {0}, answer["launches"][-1]["log"]
    assert answer["metrics"] == whole["metrics"]
    assert answer["left"] == ["latest", "step_00000009"]


def test_uninterrupted(driver, whole):
    rows = [json.loads(line) for line in whole["metrics"].splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10)) and len({row["loss"] for row in rows}) == 9
    twice = driver("twice", {"world": 2}, {"world": 2})
    check(twice, whole)
    assert [launch["resumed"] for launch in twice["launches"]] == [0, 9]


def cases() -> list:
    """One process, and each and both of two; of the many with one of two, the ones that rank 0 alone decides are for --all."""
    out = []
    for point in POINTS:
        for world, ranks in ((1, [0]), (2, [0]), (2, [1]), (2, [0, 1])):
            often = len(ranks) == world or point in ("mid_step", "mid_write", "before_marker")
            name = f"{point}-{'all' if len(ranks) == world else f'rank {ranks[0]}'} of {world}"
            out.append(pytest.param(point, world, ranks, id=name, marks=() if often else pytest.mark.slow))
    return out


@pytest.mark.parametrize(("point", "world", "ranks"), cases())
def test_kill_at_a_point(driver, whole, point, world, ranks):
    kill = {"point": point, "ranks": ranks}
    answer = driver(f"{point}_{world}_{ranks}", {"world": world, "kill": kill}, {"world": world})
    assert all(answer["launches"][0]["codes"][rank] == -9 for rank in ranks), answer["launches"][0]
    check(answer, whole)
    resumed = answer["launches"][1]["resumed"]
    if ranks == [1] and point in POINTS[3:]:
        assert resumed in (3, 6)  # rank 0 may have gone on
    else:
        assert resumed == (6 if point == "during_pruning" else 3)


@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n < 4 else pytest.mark.slow) for n in range(20)])
def test_kill_at_a_random_moment(driver, whole, number):
    world = 1 + number % 2
    kill = {"world": world, "random": number, "within": 0.3 * world, "sleep": 0.02}
    check(driver(f"random_{number}", kill, {"world": world}), whole)


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("2 to 3", [{"world": 2, "kill": {"point": "during_pruning", "ranks": [0, 1]}}, {"world": 3}]),
        ("3 to 1", [{"world": 3, "kill": {"point": "mid_step", "ranks": [2]}}, {"world": 1}]),
        ("blocking", [{"world": 2, "asynchronous": False, "kill": {"point": "mid_write", "ranks": [1]}}, {"world": 2}]),
    ],
)
def test_relaunch_on_another_mesh_or_blocking(driver, whole, name, launches):
    answer = driver(name, *launches)
    assert -9 in answer["launches"][0]["codes"]
    check(answer, whole)
    assert answer["launches"][1]["resumed"] == (6 if name == "2 to 3" else 3)


def test_planted_fault_a_marker_before_the_data_is_caught(driver, whole):
    fault = {"world": 1, "kill": {"point": "mid_write", "ranks": [0]}, "fault": True}
    answer = driver("fault", fault, {"world": 1})
    with pytest.raises(AssertionError):
        check(answer, whole)
