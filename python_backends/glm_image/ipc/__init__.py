"""One local channel between the processes of a server: each instance answers questions and publishes progress.

Each instance is an ``IpcServer`` with two sockets in a private folder. Clients connect to all of them. There is no
broker, so the failure of one process leaves the others connected.
"""

from glm_image.ipc.client import EventListener, Replies, call_all, call_one
from glm_image.ipc.protocol import Message, folder, nodes
from glm_image.ipc.server import Handler, IpcServer
from glm_image.ipc.subscriber import Follower

__all__ = [
    "EventListener",
    "Follower",
    "Handler",
    "IpcServer",
    "Message",
    "Replies",
    "call_all",
    "call_one",
    "folder",
    "nodes",
]
