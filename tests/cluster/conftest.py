"""Fixtures of the cluster tests."""

from __future__ import annotations

import os

from cluster_helpers import RAY_ENV

# Ray reads some of these when it is imported, so they are set before any test module does.
for name, value in RAY_ENV.items():
    os.environ.setdefault(name, value)
