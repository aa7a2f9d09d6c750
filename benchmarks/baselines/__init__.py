"""Other people's methods, which live here and not in the product."""
