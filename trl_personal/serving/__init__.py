"""Serving: answers for many users and prompts."""
