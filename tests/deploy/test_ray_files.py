"""The files of deploy/ray: the configurations are the program's, the cluster fits Ray's schema, the upload is small."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jsonschema
import pathspec
import yaml
from chart import ROOT

from branchline import config

RAY_FILES = ROOT / "deploy" / "ray"


def test_the_configurations_are_read_by_the_program() -> None:
    assert config.load(RAY_FILES / "config.yaml").gateway.grpc_port == 0
    nodes = config.load(RAY_FILES / "nodes.yaml")
    assert {nodes.prefill.host, nodes.decode.host, nodes.gateway.host} == {"0.0.0.0"}


def test_the_cluster_of_machines_fits_rays_schema() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load((RAY_FILES / "vms.yaml").read_text(encoding="utf-8")), schema)


def test_what_is_uploaded_with_a_job_is_small_and_has_what_it_names() -> None:
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".rayignore").read_text(encoding="utf-8").splitlines())
    uploaded = [path for path in ROOT.rglob("*") if path.is_file() and not ignored.match_file(path.relative_to(ROOT))]
    names = {str(path.relative_to(ROOT)) for path in uploaded}
    assert {"cluster/launch.py", "deploy/ray/config.yaml", "deploy/ray/nodes.yaml"} <= names
    assert sum(path.stat().st_size for path in uploaded) < 64 << 20
