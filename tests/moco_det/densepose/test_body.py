"""The body's files, its symmetries, and distances on a template whose geodesics are known."""

import os
import pickle
import sys

import numpy as np
import pytest
from densepose_template import FAR, distance, write_template
from scipy.io import savemat

from moco_det.common.errors import UserError
from moco_det.densepose import body
from moco_det.densepose.body import file_path, load_symmetries, mean_distances, read_geodesics

STEPS = 5


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return write_template(tmp_path / "densepose" / "data", STEPS)


def between(geodesics, first, second):
    """Metres between two lists of (part, U, V)."""
    points = []
    for places in (first, second):
        parts, u, v = np.array(places).T
        points.append(geodesics.nearest(parts.astype(int), u, v))
    return geodesics.distances(*points)


def test_distances_are_the_templates(folder):
    random = np.random.default_rng(0)
    ends = []
    for _ in range(2):
        places = np.stack([random.integers(1, 25, 400), *random.integers(0, STEPS + 1, (2, 400))])
        ends.append([(part, u / STEPS, v / STEPS) for part, u, v in places.T])
    for index in range(0, 400, 2):  # the same pair of charts, or there are few that are near
        ends[1][index] = (ends[0][index][0], *ends[1][index][1:])
    expected = [distance(*pair) for pair in zip(*ends, strict=True)]
    found = between(read_geodesics(), *ends)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found < FAR).sum() > 200


def test_hand_values(folder):
    """A chart's side is 0.25 m, cut into five."""
    first = [(1, 0.2, 0.2), (1, 0.2, 0.2), (1, 0.8, 0.0), (2, 1, 0.4), (24, 0, 0)]
    second = [(1, 0.6, 0.2), (1, 0.8, 1.0), (2, 0.2, 0.0), (3, 0, 0.4), (24, 0, 0)]
    found = between(read_geodesics(), first, second)
    np.testing.assert_allclose(found, [0.1, 0.25, 0.1, 10, 0], atol=1e-6)
    # On the seam two charts have the same points.
    assert between(read_geodesics(), [(1, 1, 0.4)], [(2, 0, 0.4)]) == [0]


def test_a_point_stands_for_the_nearest_vertex(folder):
    found = between(read_geodesics(), [(7, 0.29, 0.31)], [(7, 0.2, 0.4)])
    assert found == [0]


def test_background_is_infinitely_far(folder):
    geodesics = read_geodesics()
    points = geodesics.nearest(np.array([0, 5]), np.array([0, 0.2]), np.array([0, 0.2]))
    assert points[0] == -1
    np.testing.assert_array_equal(geodesics.distances(points, points), [np.inf, 0])


def test_mean_distances_are_those_of_the_coarse_part():
    parts = np.array([1, 2, 3, 4, 5, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 24])
    expected = [0.351, 0.351, 0.107, 0.107, 0.126, 0.126, 0.237, 0.237]
    expected += [0.173, 0.173, 0.142, 0.142, 0.128, 0.128, 0.150, 0.150]
    np.testing.assert_array_equal(mean_distances(parts), expected)


def test_missing_files_are_named_with_their_place(folder):
    (folder / "Pdist_matrix.pkl").unlink()
    with pytest.raises(UserError) as error:
        read_geodesics()
    assert f"needs Pdist_matrix.pkl in {folder}: download https://" in str(error.value)


def test_no_code_is_run(folder):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    (folder / "Pdist_matrix.pkl").write_bytes(pickle.dumps({"Pdist_matrix": Harm()}))
    with pytest.raises(UserError, match=r"Pdist_matrix\.pkl cannot be read safely"):
        read_geodesics()
    assert not (folder / "harm").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Pdist_matrix.pkl", [1.0], r"Pdist_matrix\.pkl holds no array Pdist_matrix"),
        ("Pdist_matrix.pkl", {"Pdist_matrix": np.zeros(7)}, "the third has 7"),
        ("SMPL_SUBDIV_TRANSFORM.mat", {"index": np.ones(7)}, "the second 7 points"),
        ("SMPL_SUBDIV_TRANSFORM.mat", {"index": np.zeros(864)}, "points do not count from 1"),
        ("SMPL_SUBDIV_TRANSFORM.mat", {"indices": np.ones(7)}, r"holds no array index: download"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, name, content, message):
    if name.endswith(".mat"):
        savemat(folder / name, content)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        read_geodesics()


def test_a_damaged_file_is_refused(folder):
    (folder / "SMPL_subdiv.mat").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"SMPL_subdiv\.mat is damaged or not a MATLAB file"):
        read_geodesics()


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    folder = tmp_path / "densepose" / "data"
    folder.mkdir(parents=True)
    return folder


def test_what_is_missing_is_named_with_source_and_place(empty_folder, tmp_path):
    (empty_folder / "SMPL_subdiv.mat").touch()
    with pytest.raises(UserError) as error:
        body.require(body.GEODESICS, "a metric")
    assert str(error.value) == (
        f"a metric needs SMPL_SUBDIV_TRANSFORM.mat, Pdist_matrix.pkl in {empty_folder}: download "
        "https://dl.fbaipublicfiles.com/densepose/data/SMPL_SUBDIV_TRANSFORM.mat, and the others "
        "beside it (no checksum is published); DETECTRON2_DATASETS names the folder that holds "
        f"densepose/data, now {tmp_path}"
    )


def test_nothing_is_missing(empty_folder):
    for name in body.GEODESICS:
        (empty_folder / name).touch()
    assert body.missing(body.GEODESICS) == []
    body.require(body.GEODESICS, "a metric")
    assert body.missing([body.SYMMETRIES]) == [empty_folder / "UV_symmetry_transforms.mat"]


def test_scipy_is_asked_for(empty_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs the package scipy: pip install scipy"):
        body.require([], "a metric")


def test_the_names_are_those_of_detectron2():
    data = pytest.importorskip(
        "densepose.data.datasets.coco", reason="Detectron2's DensePose", exc_type=ImportError
    )
    assert data.DENSEPOSE_METADATA_URL_PREFIX == body.SITE
    urls = data.get_metadata(data.DENSEPOSE_METADATA_URL_PREFIX)
    assert {url.rsplit("/", 1)[1] for url in urls.values()} == {
        body.SYMMETRIES,
        body.VERTICES,
        body.POINTS,
    }


def test_no_file_of_symmetries(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as raised:
        load_symmetries()
    message = str(raised.value)
    assert "RANDOM_FLIP horizontal" in message
    assert "https://dl.fbaipublicfiles.com/densepose/data/UV_symmetry_transforms.mat" in message
    assert str(file_path("UV_symmetry_transforms.mat").parent) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"U_transforms": np.zeros((1, 24))}, "U_transforms and V_transforms"),
        ({name: np.zeros((1, 3, 256, 256)) for name in ("U_transforms", "V_transforms")}, "not"),
    ],
)
def test_another_file_than_that_of_symmetries(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = file_path("UV_symmetry_transforms.mat")
    path.parent.mkdir(parents=True)
    savemat(path, content)
    with pytest.raises(UserError, match=message) as raised:
        load_symmetries()
    assert str(path) in str(raised.value)
