"""Checkpoints on disk: reading a source's shards, reading and writing packed checkpoints.

It knows tensors, names and files; nothing of models or of how codes are chosen.
"""
