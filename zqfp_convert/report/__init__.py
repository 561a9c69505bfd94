"""What a checkpoint is, told to people: one page, one picture, and what could make it better.

All of it comes from what the checkpoint and its evaluation have on record; no model runs here.
"""
