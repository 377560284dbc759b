"""Trunks: stacks of layers."""
