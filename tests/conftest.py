"""What all tests share."""

from __future__ import annotations

import os

# No test may reach for a model hub, and workers on shared cores must not spin: both before torch is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
