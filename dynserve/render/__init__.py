"""Conversion of tokens to the bytes of an API: the renderer, and one format per API."""
