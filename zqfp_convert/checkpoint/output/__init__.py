"""A checkpoint that comes about: shard by shard, in a folder that a later run can go on with."""
