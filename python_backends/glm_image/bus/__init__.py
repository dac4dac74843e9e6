"""One local channel between the processes of a server: each instance answers questions and publishes progress.

An instance is a ``Node`` with two sockets in a private folder; whoever wants something connects to all of them. There
is no broker, so nothing of the server depends on another part of it for this.
"""

from glm_image.bus.caller import Answers, Listener, ask_all, ask_one
from glm_image.bus.follower import Follower
from glm_image.bus.node import Handler, Node
from glm_image.bus.places import Message, folder, nodes

__all__ = [
    "Answers",
    "Follower",
    "Handler",
    "Listener",
    "Message",
    "Node",
    "ask_all",
    "ask_one",
    "folder",
    "nodes",
]
