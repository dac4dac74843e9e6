"""A process of its own that runs one tritonserver; standard library only, and nothing of the other packages.

It guarantees that nothing of the server outlives its owner, ``serve``; ends the server when one of its processes dies,
is stopped or hangs; and always reads the server's log, so that no process of the server waits for a reader.
"""
