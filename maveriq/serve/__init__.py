"""The HTTP service: OpenAI's API for served models, endpoints by intent, state that survives restarts, metrics."""
