"""The frontend role: OpenAI's HTTP on one side, the planes on the other."""
