"""l3m_like: a training run is one YAML file. Importing this imports nothing heavy; names are loaded when they are used."""

from l3m_like.core.lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, {"training.train": ["train"], "training.load": ["load"]})
__all__ = [*__all__, "__version__"]
