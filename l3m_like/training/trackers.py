"""Where metrics go besides metrics.jsonl: Weights & Biases, TensorBoard, Aim. Each is imported only if asked for."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l3m_like.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

WANDB_FILE = ".wandb.yaml"
#: key of ``.wandb.yaml`` -> the environment variable that says the same and wins
WANDB_KEYS = {"entity": "WANDB_ENTITY", "api-key": "WANDB_API_KEY", "host-name": "WANDB_BASE_URL"}


class Tracker(Protocol):
    """What a tracker does; called on the main process only."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """``array``: uint8 [H, W, 3]."""

    def close(self, final: Mapping[str, float]) -> None: ...


def open_trackers(
    log: Any, run_dir: Path, *, resume_step: int = 0, run_id: str | None = None, stamp: Mapping[str, Any] | None = None
) -> list[Tracker]:
    """The trackers that the ``log`` section asks for (``wandb``: a section or None, ``tensorboard``, ``aim``: bool).

    Raises:
        UserError: a package or a key is missing, with what to do about it.
    """
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(TensorBoard(run_dir / "tensorboard", resume_step=resume_step))
    if log.aim:
        trackers.append(Aim(run_dir, stamp=stamp or {}))
    if log.wandb is not None:
        w = log.wandb
        trackers.append(Wandb(run_dir, project=w.project, entity=w.entity, mode=w.mode, tags=w.tags, run_id=run_id, stamp=stamp))
    return trackers


class TensorBoard:
    """Event files in ``folder``; after a resume, TensorBoard drops what the earlier process wrote for later steps."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("log.tensorboard: the package is not installed. Run: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._writer.add_image(name, array, step, dataformats="HWC")

    def close(self, final: Mapping[str, float]) -> None:
        self._writer.close()


class Aim:
    """An Aim repository in the run's directory; a resumed run goes on under its hash."""

    def __init__(self, run_dir: Path, *, stamp: Mapping[str, Any]) -> None:
        try:
            import aim
        except ImportError as error:
            raise UserError("log.aim: the package is not installed. Run: pip install aim") from error
        self._aim = aim
        kept = run_dir / "aim_hash"
        run_hash = kept.read_text().strip() if kept.exists() else None
        self._run = aim.Run(run_hash=run_hash, repo=str(run_dir), system_tracking_interval=None, capture_terminal_logs=False)
        kept.write_text(self._run.hash)
        self._run["stamp"] = dict(stamp)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.track(value, name=name, step=step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        from PIL import Image

        self._run.track(self._aim.Image(Image.fromarray(array)), name=name, step=step)

    def close(self, final: Mapping[str, float]) -> None:
        self._run["final"] = dict(final)
        self._run.close()


class Wandb:
    """A Weights & Biases run; a resumed run appends to the one with its id (``run_id``, else one kept in the run's directory).

    Steps are an ordinary metric there, ``step``, the x-axis of all others: W&B's own counter only rises, and would drop what a
    run says again after it resumed from an earlier step.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str = "l3m-like",
        entity: str | None = None,
        mode: str = "online",
        tags: list[str] | None = None,
        run_id: str | None = None,
        stamp: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("log.wandb: the package is not installed. Run: pip install wandb") from error
        self._wandb = wandb
        settings = wandb_settings(Path.cwd())
        chosen: Any = os.environ.get("WANDB_MODE", mode)
        given = {"host-name": "base_url", "api-key": "api_key"}
        explicit: dict[str, Any] = {name: settings[key] for key, name in given.items() if key in settings}
        try:
            # without a key W&B would ask for one, on a terminal that nobody may be looking at
            ask = chosen == "online" and "api_key" not in explicit
            if ask and not wandb.login(host=settings.get("host-name"), prompt=False, verify=False):
                raise UserError(
                    f"log.wandb: there is no API key. Put `api-key: ...` into {WANDB_FILE} (not into git), set WANDB_API_KEY, "
                    "run `wandb login`, or set log.wandb.mode=offline."
                )
            self._run = wandb.init(
                dir=str(run_dir),
                project=project,
                entity=entity or settings.get("entity"),
                name=run_dir.name,
                id=run_id or kept_id(run_dir / "wandb_id"),
                resume="allow",
                mode=chosen,
                tags=list(tags or []),
                config=dict(stamp or {}),
                settings=wandb.Settings(console="off", **explicit),
            )
        except wandb.errors.Error as error:
            raise UserError(f"log.wandb: {error} Set log.wandb.mode=offline to train without a connection.") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(array)})

    def close(self, final: Mapping[str, float]) -> None:
        self._run.summary.update(dict(final))
        self._run.finish()


def kept_id(path: Path) -> str:
    """The id in ``path``, made and kept there the first time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def wandb_settings(folder: Path) -> dict[str, str]:
    """``entity``, ``api-key``, ``host-name`` from the environment, else from the nearest ``.wandb.yaml`` in or above ``folder``.

    Raises:
        UserError: the file is not a mapping of these keys to strings.
    """
    path = next((found for parent in (folder, *folder.parents) if (found := parent / WANDB_FILE).is_file()), None)
    settings: dict[str, str] = {}
    expected = f"Write {', '.join(f'`{key}: ...`' for key in WANDB_KEYS)}, one a line."
    if path is not None:
        import yaml

        try:
            loaded = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            # not the error's text: it quotes the file, which holds a secret
            line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
            raise UserError(f"{path} is not YAML (line {line}). {expected}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"{path} is not a mapping. {expected}")
        for key, value in loaded.items():
            if key not in WANDB_KEYS:
                raise UserError(f"{path}: unknown key '{key}'. {did_you_mean(str(key), WANDB_KEYS)}")
            if value is not None:
                settings[key] = str(value)
    return settings | {key: os.environ[name] for key, name in WANDB_KEYS.items() if os.environ.get(name)}
