"""Blocks between the trunk and the head."""
