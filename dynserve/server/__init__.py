"""The HTTP server: uvicorn with bounds, and shortcuts past ASGI for answers."""
