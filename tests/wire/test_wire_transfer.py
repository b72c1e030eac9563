from __future__ import annotations

import pytest

from branchline.config import ConfigError, TransferConfig
from branchline.wire.channels import open_channel
from branchline.wire.transfer import MAX_STREAMS, GrpcTransport


@pytest.mark.parametrize("streams", [0, MAX_STREAMS + 1])
def test_a_handoff_has_as_many_streams_as_a_receiver_takes(streams: int) -> None:
    assert TransferConfig(MAX_STREAMS).streams == MAX_STREAMS
    with pytest.raises(ConfigError, match=r"transfer\.streams"):
        TransferConfig(streams)
    with pytest.raises(AssertionError):
        GrpcTransport([None] * streams)


async def test_channels_are_made_with_and_without_a_connection_of_their_own() -> None:
    for shared in (True, False):
        async with open_channel("127.0.0.1:1", shared=shared) as channel:
            assert channel.get_state() is not None
