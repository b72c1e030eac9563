"""Channels between Branchline's own processes, and the transport options both ends must agree on.

A peer that stalls without closing its socket (a frozen machine, a cut cable) is found only by HTTP/2 pings,
and pings work only when all of these options are set together, on both ends: a client that pings a server
which does not expect it is disconnected with `too_many_pings`.
"""

from __future__ import annotations

import grpc

from branchline.core import InvalidRequestError
from branchline.wire.tls import ChannelTls

Options = tuple[tuple[str, int], ...]

#: A ping after this much silence, and how long its answer may take: a dead peer is noticed within their sum.
KEEPALIVE_TIME_MS = 3_000
KEEPALIVE_TIMEOUT_MS = 3_000

#: The largest message, gRPC's own framing included. KV frames hold 2 MiB (`frames.MAX_FRAME_BYTES`); what is
#: left is for requests: a million token ids take 3 to 5 bytes each.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024

_COMMON: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
)

CHANNEL_OPTIONS: Options = (
    *_COMMON,
    # A worker that was restarted must be found again at once, not after gRPC's default of up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # also the least time that one attempt to connect is given
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Workers talk to each other directly, whatever proxy the environment names for the rest of the world.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: Options = (
    *_COMMON,
    # gRPC's default lets a second server bind the same port, and the kernel then splits the calls between them.
    ("grpc.so_reuseport", 0),
    # Accept pings as often as our channels send them; the SDK's are rarer.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(address: str, *, shared: bool = True, tls: ChannelTls | None = None) -> grpc.aio.Channel:
    """A channel to `HOST:PORT`; connects with its first call. The caller closes it: `async with` or `close()`.
    Without `tls` it is plain text.

    Channels to the same address share one connection, but for those that aren't `shared`: each has its own.
    It belongs to the event loop that runs now. Raises InvalidRequestError when `address` is not HOST:PORT.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidRequestError(f"an address must be HOST:PORT, got {address!r}")
    own = () if shared else (("grpc.use_local_subchannel_pool", 1),)
    options = CHANNEL_OPTIONS + own
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials, options=(*options, *tls.options))
