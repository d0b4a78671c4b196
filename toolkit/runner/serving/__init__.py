"""An HTTP server that answers OpenAI's API with one model.

wire -> requests -> routes -> jobs: bytes become a request, which may be made and is understood,
and waits for its turn; one event loop speaks with all clients, one thread works the engine.
"""
