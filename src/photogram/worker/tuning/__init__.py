"""What the worker does to the networks of a loaded, unmodified pipeline to make them fast.

Every piece leaves a network's interface and its maths as they are, is chosen by the settings and the device, and says
in one line what it did (`tune.py`). Knows nothing of jobs, fibers and stacking.
"""
