"""The service: engines under one controller, kept up for users over HTTP."""
