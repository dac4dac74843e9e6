"""Messages between the processes of a server: every instance answers requests and publishes events.

Each instance is an ``IpcServer`` with two sockets in a private folder. Clients connect to all of them. There is no
broker, so the failure of one process leaves the others connected.
"""
