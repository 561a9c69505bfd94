"""The method: from a weight matrix and statistics of its inputs to codes, scales and factors.

Start reading at `weight.py`, which has the whole of it on one screen. Functions of tensors and
plain values only: no files, no models.
"""
