"""Conversion of text to token ids and back: chat templates, tokenizers and detokenizers."""
