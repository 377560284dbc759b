"""Blocks between trunk and head."""
