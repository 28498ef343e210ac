"""What the methods' papers claim, measured again."""
