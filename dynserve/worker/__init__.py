"""The worker role: an executor on the planes."""
