"""Synthetic training data that fits a run, so that its benchmark needs no files."""

from __future__ import annotations

from typing import Any

from l3m_like.config import RunConfig
from l3m_like.core.errors import UserError, did_you_mean

#: length of documents: mean and sigma of the log-normal, as web text has them
MEAN, SIGMA, SHORTEST = 700, 1.0, 16

#: what `--data` knows -> what it is
KINDS = {
    "tokens": "rows that are full: one document of random tokens each",
    "documents": "log-normal documents of random tokens, packed (FitPack, best fit)",
    "documents-padded": "the same documents, one per row",
    "latents": "random latents and classes",
}


def synthetic_data(cfg: RunConfig, kind: str) -> None:
    """Replace ``data.train`` of ``cfg`` by data of this ``kind``, with the sizes that the run's knobs say.

    Raises:
        UserError: an unknown kind, or a run without the knobs that it needs.
    """
    if kind not in KINDS:
        raise UserError(f"--data {kind}: no such data. {did_you_mean(kind, KINDS)}")
    cfg.data.sets["train"] = {"_target_": "l3m_like.data.Dataset", **_dataset(cfg, kind)}
    noise = cfg.model.get("noise") or {}
    if kind == "latents" and noise.get("latent"):  # a run that draws latents from cached moments: here they are drawn already
        noise["latent"] = None
        cfg.model["preprocessor"]["noise"].pop("reads")
        for setting in ("elements", "reads"):
            cfg.loss["flow"].pop(setting)
        cfg.evals.clear()  # their data are moments


def _dataset(cfg: RunConfig, kind: str) -> dict[str, Any]:
    if kind == "latents":
        channels, size, classes = (_knob(cfg, name, kind) for name in ("channels", "image_size", "classes"))
        return {
            "source": {"_target_": "l3m_like.data.RandomLatents", "channels": channels, "size": size, "classes": classes},
            "process": {"_target_": "l3m_like.data.ClassLatent", "channels": channels, "size": size},
            "pack": {"_target_": "l3m_like.data.Stack"},
        }
    vocabulary, length = _knob(cfg, "vocab_size", kind), _knob(cfg, "sequence", kind)
    lengths = {
        "_target_": "l3m_like.data.LogNormal",
        "mean": MEAN,
        "sigma": SIGMA,
        "shortest": min(SHORTEST, length),
        "longest": length,
    }
    packs: dict[str, dict[str, Any]] = {
        # a row is one document, and padding comes last: a causal mask is enough
        "tokens": {"_target_": "l3m_like.data.OnePerRow", "length": length, "separate": _counts_documents(cfg)},
        "documents": {"_target_": "l3m_like.data.FitPack", "length": length, "fit": "best"},
        "documents-padded": {"_target_": "l3m_like.data.OnePerRow", "length": length, "separate": _counts_documents(cfg)},
    }
    return {
        "source": {
            "_target_": "l3m_like.data.RandomTokens",
            "vocab_size": vocabulary,
            "length": length if kind == "tokens" else lengths,
        },
        "process": {"_target_": "l3m_like.data.TokenIds", "vocab_size": vocabulary},
        "pack": packs[kind],
    }


def _counts_documents(cfg: RunConfig) -> bool:
    """Whether a loss (of experts' loads, say) counts by the documents' ids, which the data then write."""
    return any("document_ids" in loss.count_reads for loss in cfg.instantiate("loss").values() if not loss.count_late)


def _knob(cfg: RunConfig, name: str, kind: str) -> int:
    value = cfg.knobs.get(name)
    if not isinstance(value, int):
        raise UserError(
            f"--data {kind} takes its sizes from the run's knobs, and this run has {name} = {value}. Give the config the knob "
            f"{name} (a number), or choose another of {', '.join(KINDS)}."
        )
    return value
