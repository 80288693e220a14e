"""Replies of a chat model: written token by token, for a terminal, a browser page and programs."""
