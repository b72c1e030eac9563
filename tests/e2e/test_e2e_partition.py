"""A network that is cut between prefill and decode workers, while the gateway reaches them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from e2e_model import TinyModel

from branchline.config import to_mapping

pytestmark = [pytest.mark.wire, pytest.mark.timeout(300)]

UNSHARE = ["unshare", "--map-root-user", "--net"]


def _namespaces() -> bool:
    """Whether this system lets its users make networks of their own."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    made = subprocess.run([*UNSHARE, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, check=False)
    return made.returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="needs unshare, nsenter, ip and the right to make network namespaces")
def test_a_cut_between_prefill_and_decode_ends_in_failover_or_an_error(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_mapping(tiny.config(**{"gateway.stall_timeout_s": 3.0}))))
    world = Path(__file__).with_name("partition_world.py")
    # A script finds only its own directory's modules; pytest found the rest in its `pythonpath`.
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*UNSHARE, sys.executable, str(world), str(path)]
    done = subprocess.run(command, env=places, capture_output=True, text=True, timeout=280, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "one of two cut: 0 failovers" not in done.stdout
