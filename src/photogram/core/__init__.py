"""Words that both towers share: configuration, errors, requests, cards, messages.

Knows nothing of HTTP, torch or the disk; imports the standard library and msgspec only.
"""
