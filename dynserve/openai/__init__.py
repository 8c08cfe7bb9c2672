"""OpenAI's protocol on both ends: requests in (protocol, prompt), bytes out (detokenize, render)."""
