"""Data: sources -> process -> pack -> lanes -> loader. Importing a name here imports only the module that defines it."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "dataset": ["Dataset", "Item", "Visit"],
        "sources.json_lines": ["JsonLines"],
        "sources.web_dataset": ["WebDataset"],
        "processors.tokenize": ["Tokenize"],
        "processors.class_image": ["ClassImage"],
        "processors.class_latent": ["ClassLatent"],
        "mixing": ["Mix"],
        "packing": ["ConcatPack", "FitPack", "OnePerRow", "Cost", "Stack", "Piece"],
        "lanes": ["Lane"],
        "order": ["Order"],
        "loader": ["Loader", "EvalLoader", "Step"],
        "paths": ["DataMissing"],
    },
)
