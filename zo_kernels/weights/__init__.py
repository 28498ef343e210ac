"""What is trained: the tables of the primitive, parameter groups, masks, blocks and shards."""
