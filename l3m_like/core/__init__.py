"""Blocks, models and their wiring. Importing a name here imports only the module that defines it."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "block": ["ReadWriteBlock", "Wrap"],
        "meta_model": ["MetaModel", "Frozen", "Tower", "Series"],
        "keys": ["KeySpec"],
        "errors": ["UserError", "did_you_mean"],
        "init": ["Normal", "Uniform", "Zeros", "Ones", "XavierUniform"],
        "wiring": ["Wiring", "check_wiring"],
    },
)
