"""A server to test programs against that use the SDK: in the same process, on loopback, without a model.

from branchline.client import Client
from branchline.client.testing import FakeServer

def test_my_program():
    with FakeServer({"The capital of France is": " Paris."}) as server, Client(server.target) as client:
        assert client.complete(prompt="The capital of France is").text == " Paris."
        assert server.requests[0].message.prompt == "The capital of France is"
"""

from branchline.client.testing.script import Answer, Break, Fault, Pause, Raw, Reply, Request, Script
from branchline.client.testing.server import FakeServer

__all__ = ["Answer", "Break", "FakeServer", "Fault", "Pause", "Raw", "Reply", "Request", "Script"]
