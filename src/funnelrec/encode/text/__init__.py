"""Text to tokens, and tokens to vectors, classes or more text."""
