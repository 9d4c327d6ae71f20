"""Models as training loads and writes them."""
