"""What was asked for, where it stands and how it ended, kept across crashes.

Knows states and their legal order, SQL and how long things are kept; knows nothing of HTTP, pixels or workers.
"""
