"""Train: python run/launcher.py --config configs/experiment/llm.yaml [key=value ...]   (--help; docs/configs.md)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from l3m_like.config.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
