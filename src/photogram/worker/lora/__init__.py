"""LoRAs in the worker: read, converted to one layout, checked against the model, merged into the weights and taken
out again bit for bit, or applied beside them, a different one for each row of a batch.

`reading` opens files, `conversion` turns every known format into tensors by layer, `changes` is the layout and its
arithmetic, `adapter` puts the two together for one model, `reader` does all that in a thread of its own, `library`
keeps adapters, `weights` merges and restores, `mixing` applies without merging, `service` answers the host. Knows
nothing of requests, fibers or the scheduler.
"""
