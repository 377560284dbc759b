"""The loop (train.py) and what it calls."""
