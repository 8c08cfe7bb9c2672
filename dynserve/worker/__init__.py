"""The worker role: an executor that serves requests over the planes."""
