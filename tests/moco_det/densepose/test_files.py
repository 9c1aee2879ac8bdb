"""The files of the body model: where they belong, and what is said without them."""

import builtins

import pytest

from moco_det.common.errors import UserError
from moco_det.densepose import files as densepose_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    folder = tmp_path / "densepose" / "data"
    folder.mkdir(parents=True)
    return folder


def test_what_is_missing_is_named_with_source_and_place(folder, tmp_path):
    (folder / "SMPL_subdiv.mat").touch()
    with pytest.raises(UserError) as error:
        densepose_files.require(densepose_files.GEODESICS, "a metric")
    assert str(error.value) == (
        f"a metric needs SMPL_SUBDIV_TRANSFORM.mat, Pdist_matrix.pkl in {folder}: download "
        "https://dl.fbaipublicfiles.com/densepose/data/SMPL_SUBDIV_TRANSFORM.mat, and the others "
        "beside it (no checksum is published); DETECTRON2_DATASETS names the folder that holds "
        f"densepose/data, now {tmp_path}"
    )


def test_nothing_is_missing(folder):
    for name in densepose_files.GEODESICS:
        (folder / name).touch()
    assert densepose_files.missing(densepose_files.GEODESICS) == []
    densepose_files.require(densepose_files.GEODESICS, "a metric")
    assert densepose_files.missing([densepose_files.SYMMETRIES]) == [
        folder / "UV_symmetry_transforms.mat"
    ]


def test_scipy_is_asked_for(folder, monkeypatch):
    original = builtins.__import__

    def without_scipy(name, *args, **keywords):
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(UserError, match="needs the package scipy: pip install scipy"):
        densepose_files.require([], "a metric")


def test_the_names_are_those_of_detectron2():
    data = pytest.importorskip(
        "densepose.data.datasets.coco", reason="Detectron2's DensePose", exc_type=ImportError
    )
    assert data.DENSEPOSE_METADATA_URL_PREFIX == densepose_files.SITE
    urls = data.get_metadata(data.DENSEPOSE_METADATA_URL_PREFIX)
    assert {url.rsplit("/", 1)[1] for url in urls.values()} == {
        densepose_files.SYMMETRIES,
        densepose_files.VERTICES,
        densepose_files.POINTS,
    }
