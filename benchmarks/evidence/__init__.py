"""Tables of committed rows, as the documents show them."""
