"""Evaluations that do more than sum terms over held-out data: they sample, or compare whole sets of images or features."""

from l3m_like.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "evaluation": ["Evaluation", "Findings"],
        "extractors": ["EfficientNetLite0", "Inception"],
        "judge": ["Judge"],
        "probes": ["NearestNeighbours", "LinearProbe", "AttentiveProbe"],
        "reconstruction": ["Reconstruction"],
        "sample_grid": ["SampleGrid"],
        "sample_quality": ["SampleQuality"],
        "zero_shot": ["ZeroShot"],
    },
)
