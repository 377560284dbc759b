"""Blocks before the trunk: embeddings, noise, condition dropout."""
