"""small: int8 and blocks of eight or four bits, in place of a float32 graph's products and tables."""
