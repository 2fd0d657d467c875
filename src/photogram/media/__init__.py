"""Drawn pixels become files: fit to the size asked for, encode, and write into the file how it was made.

Knows uint8 frames, file formats and quality words; knows nothing of HTTP, of jobs or of torch.
"""
