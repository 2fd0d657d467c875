"""Requests that this server makes to other servers, for URLs that clients name: checked, dialled, bounded.

`address` says which URLs and addresses may be reached, `client` reaches them. Knows nothing of pictures or webhooks.
"""
