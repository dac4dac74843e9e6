"""OpenAI-compatible gateway in front of a GLM-Image server. It needs the client, not the server, and no GPU."""
