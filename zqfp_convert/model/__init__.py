"""A transformers model without its weights: skeleton, decoder blocks, names on disk.

What the converter and the loader both need to know of a model, and no more.
"""
