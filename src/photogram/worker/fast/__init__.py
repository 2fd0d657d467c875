"""Lossy ways to spend less on a picture, each off unless a request or a setting asks for it."""
