"""The device tower: one process that loads a pipeline and runs every job of it in a fiber of its own.

Knows torch and diffusers; knows nothing of HTTP, of files for clients or of the job store.
"""
