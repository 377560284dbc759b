"""Reference classes come from transformers, which may import torchvision."""

from l3m_like.core.torchvision_ops import allow_torchvision

allow_torchvision()
