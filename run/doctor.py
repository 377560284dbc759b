"""Can this machine run l3m-like? python run/doctor.py [runs folder]   (exit code 1: an error; send it with a bug report)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from l3m_like.training.doctor import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
