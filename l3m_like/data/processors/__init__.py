"""Processors: one raw sample in, one sample of arrays out, as a function of (sample, seed, epoch)."""
