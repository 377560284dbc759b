"""The config system: a YAML file and a command line -> a checked ``RunConfig``; the launcher's logic."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "run_config": ["RunConfig"],
        "compose": ["compose", "shipped_configs"],
        "run_dir": ["start_run"],
        "cli": ["main"],
    },
)
