"""The promise of docs/diffusion_lm.md: a diffusion language model is a language model with noise, another mask, another loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l3m_like.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "experiment"


def test_the_page_prints_the_file_and_it_is_short() -> None:
    file = (CONFIGS / "dllm.yaml").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "diffusion_lm.md").read_text(encoding="utf-8")
    assert page.partition("<!-- dllm.yaml -->\n```yaml\n")[2].partition("```")[0] == file
    assert len([line for line in file.splitlines() if not line.startswith("#")]) < 15


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {name: leaf for key, entry in value.items() for name, leaf in leaves(entry, f"{path}.{key}").items()}
    return {path[1:]: value}


def test_nothing_else_differs() -> None:
    """Of all settings of the two runs, with every default filled in."""
    one, other = (leaves(RunConfig.from_file(CONFIGS / f"{name}.yaml").to_dict()) for name in ("llm", "dllm"))
    differ = {path for path in one.keys() | other.keys() if path not in one or path not in other or one[path] != other[path]}
    changed = {path for path in differ if not path.startswith(("model.noise.", "loss.", "sample."))}
    assert changed == {
        "model.noise",  # null in llm
        "model.preprocessor.reads", "model.preprocessor.reads.ids",
        "model.trunk.mask",
        "model.head.reads", "model.head.reads.targets", "model.head.writes",
        "model.preprocessor.vocab_size", "model.head.vocab_size",  # the mask's row
        "run.name",
    }  # fmt: skip
    assert one["model.trunk.mask"] == "causal" and other["model.trunk.mask"] == "full"
    assert {path.split(".")[1] for path in differ if path.startswith("loss.")} == {"next_token", "elbo"}
