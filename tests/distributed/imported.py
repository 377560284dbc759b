"""Imported once, by the server that processes are forked from: the seconds of an import that models of images need."""

from l3m_like.core.torchvision_ops import allow_torchvision

allow_torchvision()

import timm  # noqa: E402, F401
