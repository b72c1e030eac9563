"""The wire: messages and dataclasses, KV frames, channels, the servers' life cycle, status codes."""
