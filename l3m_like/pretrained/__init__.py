"""Weight names of published checkpoints: one declarative map per family, read in both directions."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "families": ["Family", "family", "family_of"],
        "name_map": ["NameMap", "Source", "export_state", "export_tensor", "import_state"],
    },
)
