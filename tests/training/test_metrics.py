"""metrics.jsonl, console, trackers and report: what a run says, and that it says it once."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from l3m_like.core.errors import UserError
from l3m_like.evaluations import Findings
from l3m_like.training.metrics import Console, MetricsLog, clock, read_metrics, short, truncate, window_rates
from l3m_like.training.report import Reporter, write_report
from l3m_like.training.trackers import Aim, Wandb, wandb_settings


def settings(**given):
    return types.SimpleNamespace(**({"console": False, "wandb": None, "tensorboard": False, "aim": False} | given))


def row(step: int, **more) -> dict:
    known = {"loss": 4.0 / step, "lr": 1e-5, "grad_norm": 0.5, "seconds": 0.5, "data_wait": 0.1, "memory": 2**30}
    counts = {"tokens": 1000, "rows": 10}
    return {"step": step} | known | {"counts": counts, "flops": 5e9, "refs": [[0, step]]} | more


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e-5, float(np.float32(0.1)), math.inf]
    log = MetricsLog(tmp_path, is_main=True, resume_step=0)
    log.write([{"step": i + 1, "loss": value} for i, value in enumerate(values)] + [{"step": 99, "loss": math.nan}])
    log.close()
    back = [line["loss"] for line in rows_of(tmp_path)]
    assert struct.pack("8d", *back[:-1]) == struct.pack("8d", *values) and math.isnan(back[-1])


def test_what_is_written_is_in_the_file_at_once(tmp_path):
    log = MetricsLog(tmp_path, is_main=True, resume_step=0)
    log.write([{"step": 1}, {"step": 2}])
    assert [line["step"] for line in rows_of(tmp_path)] == [1, 2]


def test_resuming_shows_one_history(tmp_path):
    log = MetricsLog(tmp_path, is_main=True, resume_step=0)
    log.write([{"step": step, "loss": 0.1 * step} for step in range(1, 8)])
    log.close()
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    ledger = ['{"step": 2, "id": "a"}', '{"step": 6, "id": "b"}', '{"id": "no step"}']
    (tmp_path / "ledger.jsonl").write_text("\n".join(ledger) + "\n")
    MetricsLog(tmp_path, is_main=False, resume_step=0)  # another rank touches nothing
    log = MetricsLog(tmp_path, is_main=True, resume_step=5)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:5]
    assert (tmp_path / "ledger.jsonl").read_text().splitlines() == [ledger[0], ledger[2]]
    log.write([{"step": 6, "loss": 0.25}])
    log.close()
    assert [line["step"] for line in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_start_has_no_history(tmp_path):
    log = MetricsLog(tmp_path, is_main=True, resume_step=0)
    log.write([{"step": 0, "evaluation": "heldout"}, {"step": 1}])
    log.close()
    MetricsLog(tmp_path, is_main=True, resume_step=0).close()
    assert rows_of(tmp_path) == []


def test_truncation_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    before = path.read_text()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate(path, 2)
    assert path.read_text() == before


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        MetricsLog(tmp_path, is_main=True, resume_step=3)
    assert read_metrics(tmp_path / "nowhere") == []


# ---- rates and console ---------------------------------------------------------------------------------------------------


def test_rates_are_per_wall_clock_second_with_the_wait_for_data():
    # one step of 0.1 s work and one that waited 0.9 s more: 2000 tokens in 1.1 s, not the mean of two rates
    rows = [row(1, seconds=0.1, data_wait=0.0), row(2, seconds=1.0, data_wait=0.9)]
    rates = window_rates(rows, peak_flops=1e11)
    assert rates["unit"] == "tokens" and rates["per_second"] == pytest.approx(2000 / 1.1)
    assert rates["data_wait"] == pytest.approx(0.9 / 1.1) and rates["seconds_per_step"] == pytest.approx(0.55)
    assert rates["mfu"] == pytest.approx(1e10 / 1.1 / 1e11)
    assert window_rates([{"step": 1, "seconds": 1.0}], None) == {
        "seconds_per_step": 1.0, "data_wait": 0.0, "unit": None, "per_second": None, "mfu": None, "hfu": None,
    }  # fmt: skip


def test_plain_lines_have_no_control_characters():
    out = io.StringIO()
    console = Console(100, file=out)
    console.update(row(10, loss=2.5), window_rates([row(10)], 1e11))
    console.print("heldout/loss 2.3")
    console.update(row(10, hardware_flops=6e9), window_rates([row(10, hardware_flops=6e9)], 1e11))
    console.close()
    first, second, third = out.getvalue().splitlines()
    assert first == (
        "step 10/100  loss 2.5000  lr 1.00e-05  grad 0.5  2k tokens/s  mfu 10.0%  mem 1.00 GiB  data 20%  eta 0:00:45"
    )
    assert second == "heldout/loss 2.3"
    assert "mfu 10.0%  hfu 12.0%" in third  # only where something is computed twice
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out.getvalue())


def test_the_live_line_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = Console(100, start=5, file=out)
    for step in (10, 20):
        console.update(row(step), window_rates([row(step)], None))
    console.print("heldout [/loss] 2.3")  # not taken for markup
    console.close()
    text = out.getvalue()
    assert "\x1b[" in text and "step 20/100" in text and "1.00e-05" in text and "heldout [/loss] 2.3" in text
    assert "mfu" not in text  # not known: not shown


def test_small_words():
    assert [short(value) for value in (0.5, 999, 12345, 7.1e6, 3e12)] == ["0.5", "999", "12.3k", "7.1M", "3T"]
    assert [clock(value) for value in (-1, 59.6, 3661, 360000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]


# ---- trackers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_wandb_account(monkeypatch, tmp_path):
    """An environment and a home without any W&B setting, in a folder of its own."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(("name", "missing"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("aim", "aim")])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, name, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    section = types.SimpleNamespace(project="p", entity=None, mode="offline", tags=[])
    with pytest.raises(UserError, match=f"log.{name}: .*pip install {missing}"):
        Reporter(settings(**{name: section if name == "wandb" else True}), tmp_path, True, 0, {})


def test_wandb_settings(no_wandb_account, monkeypatch):
    assert wandb_settings(no_wandb_account) == {}
    file = no_wandb_account / ".wandb.yaml"
    file.write_text("entity: us\napi-key: secret\nhost-name: https://example.org\n")
    below = no_wandb_account / "a" / "b"
    below.mkdir(parents=True)
    assert wandb_settings(below) == {"entity": "us", "api-key": "secret", "host-name": "https://example.org"}
    monkeypatch.setenv("WANDB_ENTITY", "them")
    assert wandb_settings(below)["entity"] == "them"
    file.write_text("api_key: secret\n")
    with pytest.raises(UserError, match=r"\.wandb\.yaml: unknown key 'api_key'. Did you mean 'api-key'"):
        wandb_settings(below)
    file.write_text("api-key: [secret")
    with pytest.raises(UserError, match="is not YAML") as error:
        wandb_settings(below)
    assert "secret" not in str(error.value)
    file.write_text("secret")
    with pytest.raises(UserError, match="is not a mapping"):
        wandb_settings(below)


def test_wandb_online_without_a_key_says_what_to_do(no_wandb_account, tmp_path):
    with pytest.raises(UserError, match="no API key. Put `api-key: ...` into .wandb.yaml"):
        Wandb(tmp_path, mode="online")


def test_wandb_offline_appends_under_one_id(no_wandb_account, tmp_path):
    section = types.SimpleNamespace(project="p", entity=None, mode="offline", tags=["x"])
    ids = []
    for step in (1, 2):
        reporter = Reporter(settings(wandb=section), tmp_path, True, step - 1, {"parameters": 3})
        reporter.steps([row(step)])
        reporter.image(step, "grid", np.zeros((4, 4, 1), np.uint8))
        ids.append(reporter.trackers[0]._run.id)
        reporter.trackers[0].close({"loss": 1.0})
        reporter.metrics.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) >= 1


def test_tensorboard_drops_what_was_written_before_the_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((1, 6), (3, 5)):
        reporter = Reporter(settings(tensorboard=True), tmp_path, True, start - 1, {})
        reporter.steps([row(step, loss=float(start)) for step in range(start, stop)])
        reporter.image(start, "grid", np.zeros((4, 4, 3), np.uint8))
        reporter.trackers[0].close({})
        reporter.metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]
    assert "refs" not in events.Tags()["scalars"] and "tokens_per_second" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["grid"]


def test_aim_goes_on_under_its_hash(tmp_path, monkeypatch):
    made = []

    class Run(dict):
        def __init__(self, run_hash, repo, system_tracking_interval, capture_terminal_logs):
            super().__init__()
            self.given, self.hash, self.tracked = run_hash, run_hash or "abc", []
            made.append(self)

        def track(self, value, name, step):
            self.tracked.append((name, step))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "aim", types.SimpleNamespace(Run=Run, Image=lambda image: image))
    for step in (1, 2):
        tracker = Aim(tmp_path, stamp={"a": 1})
        tracker.scalars(step, {"loss": 1.0})
        tracker.image(step, "grid", np.zeros((4, 4, 3), np.uint8))
        tracker.close({"loss": 1.0})
    assert [run.given for run in made] == [None, "abc"]
    assert made[1].tracked == [("loss", 2), ("grid", 2)] and made[1]["stamp"] == {"a": 1}


# ---- reporter and report ---------------------------------------------------------------------------------------------------


def test_a_run_from_start_to_report(tmp_path, capsys):
    stamp = {"parameters": 8_030_261_248, "device": "cpu", "versions": {"torch": "2.13"}, "random_weights": ["vision <b>"]}
    run = tmp_path / "llm & co"
    reporter = Reporter(settings(console=True), run, True, 0, stamp, total=20, peak_flops=1e11)
    for start in (1, 11):
        reporter.steps([row(step) for step in range(start, start + 10)])
        reporter.evaluation(start + 9, "heldout", Findings({"loss": 1.5, "loss/next_token": 1.5}))
    reporter.image(10, "samples", np.zeros((8, 8, 3), np.uint8))
    reporter.image(20, "samples", np.full((8, 8, 1), 255, np.uint8))
    reporter.sync()
    reporter.close({"loss": 0.2, "name": "not a number"})
    lines = rows_of(run)
    assert [line["step"] for line in lines if "evaluation" not in line] == list(range(1, 21))
    assert lines[0] == {
        "step": 1, "loss": 4.0, "lr": 1e-5, "grad_norm": 0.5, "seconds": 0.5, "data_wait": 0.1, "memory": 2**30,
        "tokens": 1000, "tokens_per_second": 2000.0, "rows": 10, "rows_per_second": 20.0, "mfu": 0.1, "hfu": 0.1,
        "refs": [[0, 1]],
    }  # fmt: skip
    assert lines[10] == {"step": 10, "evaluation": "heldout", "heldout/loss": 1.5, "heldout/loss/next_token": 1.5}
    assert "heldout/loss 1.5000" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "<h1>llm &amp; co</h1>" in page and "8,030,261,248 (8.03G)" in page
    assert "random weights: [&quot;vision &lt;b&gt;&quot;]" in page
    assert page.count("data:image/png;base64,") == 2 and "samples_00000020" in page and "samples_00000010" not in page
    assert not re.search(r"(src|href)=(?![\"']data:)", page)  # self-contained
    from PIL import Image

    assert Image.open(run / "report.png").size == (1500, 800)
    assert Image.open(run / "images" / "samples_00000020.png").getpixel((0, 0)) == (255, 255, 255)


def test_other_ranks_write_nothing(tmp_path):
    reporter = Reporter(settings(console=True, tensorboard=True), tmp_path / "run", False, 0, {})
    reporter.steps([row(1)])
    reporter.evaluation(1, "heldout", Findings({"loss": 1.0}))
    reporter.image(1, "grid", np.zeros((4, 4, 3), np.uint8))
    reporter.sync()
    reporter.close({})
    assert not (tmp_path / "run").exists()


def test_images_of_another_form_are_refused(tmp_path):
    reporter = Reporter(settings(), tmp_path, True, 0, {})
    with pytest.raises(UserError, match=r"image 'grid': expected uint8 \[H, W, 1 or 3\], got float32 \[3, 4, 4\]"):
        reporter.image(1, "grid", np.zeros((3, 4, 4), np.float32))


def test_report_of_runs_with_little_or_odd_data(tmp_path, caplog, monkeypatch):
    assert write_report(tmp_path, {}, {}) is not None  # no step at all
    log = MetricsLog(tmp_path, is_main=True, resume_step=0)
    log.write([{"step": step, "loss": math.nan if step % 7 == 0 else 1.0 / step, "grad_norm": 0.0} for step in range(1, 4000)])
    log.close()
    assert write_report(tmp_path, {"random_weights": []}, {"loss": math.nan}) is not None
    assert "random weights:" not in (tmp_path / "report.html").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_report(tmp_path, {}, {}) is None and "pip install matplotlib" in caplog.text
