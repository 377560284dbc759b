"""Run by tests/kernels/test_interpreter.py; an ordinary run, whose Triton compiles, collects nothing here."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
