"""The real `DynamoGraphDeployment`s of the wheel `ai-dynamo`, which `make install` downloads: each is read and rendered."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dynserve.deploy.documents import Notes
from dynserve.deploy.reader import KIND
from dynserve.deploy.render_command import RenderConfig, manifests

WHEEL = next(iter(Path(sys.prefix, "tools").glob("ai_dynamo-*.whl")), None)
NEWEST = "1.37"


def deployments() -> dict[str, str]:
    """Returns the files of the wheel that hold a deployment."""
    if WHEEL is None:
        return {}
    with zipfile.ZipFile(WHEEL) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith((".yaml", ".yml"))}
    return {name: text for name, text in texts.items() if f"kind: {KIND}" in text}


FILES = deployments()
pytestmark = pytest.mark.skipif(WHEEL is None, reason="the wheel ai-dynamo is not here: `make install` downloads it")


def test_the_corpus_has_files_of_both_versions() -> None:
    versions = [yaml.safe_load(text.split("---")[0] or text) for text in FILES.values()]
    assert len(FILES) == 15, sorted(FILES)
    assert {one["apiVersion"] for one in versions} == {"nvidia.com/v1alpha1", "nvidia.com/v1beta1"}


@pytest.mark.parametrize("name", FILES or ["none"])
def test_each_file_is_rendered_and_what_it_cannot_have_is_said(name: str, tmp_path: Path) -> None:
    path, notes = tmp_path / "f.yaml", Notes()
    path.write_text(FILES[name])
    objects = manifests(str(path), RenderConfig(image="registry.example/dynserve:1"), notes)
    for one in objects:
        kubernetes_validate.validate(one, NEWEST, strict=True)
    names = [one["metadata"]["name"] for one in objects if one["kind"] == "Deployment"]
    assert len(names) >= 2 and any("frontend" in one for one in names)
    assert ("dynamo.planner" not in FILES[name]) or any("planner" in line for line in notes.lines)
