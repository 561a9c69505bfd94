"""Packed checkpoints in programs of others: what these look for, and nothing they do not."""
