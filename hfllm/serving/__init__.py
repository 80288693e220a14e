"""Replies of a chat model, token by token: for a terminal, a browser page and programs."""
