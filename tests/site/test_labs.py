"""Every lab, committed as it ran, runs again from its first cell to its last."""

import json
import os
import shutil

import nbclient
import nbformat
import pytest

from tests.site.trial import ROOT

LABS = sorted((ROOT / "docs").rglob("*.ipynb"))
SECONDS = 600  # a lab takes at most three minutes on two free cores


def name(path) -> str:
    return path.relative_to(ROOT / "docs").as_posix()


@pytest.mark.parametrize("lab", LABS, ids=name)
def test_a_lab_is_committed_as_it_ran(lab):
    cells = [cell for cell in json.loads(lab.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()]
    assert counts == list(range(1, len(counts) + 1)), f"{name(lab)} was not run from top to bottom: {counts}"
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, f"{name(lab)} holds an error: {errors[0].get('evalue')}"


@pytest.mark.slow
@pytest.mark.parametrize("lab", LABS, ids=name)
def test_a_lab_runs(lab, tmp_path, monkeypatch):
    """In a copy of its folder, so that the committed figures stay; the project is found by PYTHONPATH."""
    folder = shutil.copytree(lab.parent, tmp_path / lab.parent.name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(lab, as_version=4)
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
