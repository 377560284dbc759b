"""One file per operation: a plain-torch reference and faster versions, chosen by config.

A file is named for its operation, so import from the file: ``from l3m_like.kernels.attention import attention``.
"""
