"""What is wrong with a COCO file: refused in one line, and by the doctor in the same words."""

import json
import os
import resource

import pytest
from examined import doctor, problems
from PIL import Image
from tiny_coco import tiny_coco, write_tiny_coco

from moco_det import visualize
from moco_det.common.errors import UserError
from moco_det.common.images import read_upright
from moco_det.datasets import Wanted, get_dataset

TWO = ("MODEL.ROI_HEADS.NUM_CLASSES", 2)
INF, NAN = float("inf"), float("nan")
RLE = {"size": [96, 128], "counts": [0, 96, 96 * 127]}

REFUSED = [
    ({"bbox": [1, 2, INF, 4]}, "annotation 1 of image 1 has the bbox [1, 2, inf, 4]: it needs"),
    ({"bbox": [1, NAN, 3, 4]}, "annotation 1 of image 1 has the bbox [1, nan, 3, 4]: it needs"),
    ({"bbox": [1, 2, 3]}, "annotation 1 of image 1 has the bbox [1, 2, 3]: it needs"),
    ({"bbox": ["1", 2, 3, 4]}, "annotation 1 of image 1 has the bbox ['1', 2, 3, 4]: it needs"),
    ({"bbox": [1, 2, 1e30, 4]}, "annotation 1 of image 1 has the bbox [1, 2, 1e+30, 4]: it"),
    ({"bbox": [10**400, 2, 0.5, 4]}, "annotation 1 of image 1 has the bbox "),
    ({"segmentation": [[1, 2, INF, 4, 5, 6]]}, "annotation 1 of image 1 has a polygon with inf"),
    ({"segmentation": [[1, 2, NAN, 4, 5, 6]]}, "annotation 1 of image 1 has a polygon with nan"),
    ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, "annotation 1 of image 1 has a polygon with 10000"),
    ({"segmentation": [[1, 2, "x", 4, 5, 6]]}, "annotation 1 of image 1 has a polygon with 'x'"),
    ({"segmentation": [1, 2, 3]}, "annotation 1 of image 1 has a polygon with 1: it needs"),
    ({"segmentation": "x"}, "annotation 1 of image 1 has the segmentation 'x', neither polygons"),
    (
        {"segmentation": RLE | {"size": [10**9, 10**9]}},
        "annotation 1 of image 1 has a mask of (height, width) [1000000000, 1000000000]; its image",
    ),
    (
        {"segmentation": RLE | {"counts": [0, 10**6]}},
        "annotation 1 of image 1 has a mask whose runs do not make up its size",
    ),
    (
        {"segmentation": RLE | {"counts": [-5, 96 * 128 + 5]}},
        "annotation 1 of image 1 has a mask whose runs do not make up its size",
    ),
    (
        {"segmentation": RLE | {"counts": "\x7f~~"}},
        "annotation 1 of image 1 has a mask whose runs do not make up its size",
    ),
    ({"id": INF}, "annotation inf of image 1 has an id that is no number"),
    ({"area": "120"}, "annotation 1 of image 1 has the area '120': it needs a number"),
    ({"area": INF}, "annotation 1 of image 1 has the area inf: it needs a number"),
    ({"iscrowd": "no"}, "annotation 1 of image 1 has iscrowd 'no', which is 0 or 1"),
    ({"category_id": 9}, "annotation 1 of image 1 is of category 9, which is not listed"),
    ({"category_id": [1]}, "annotation 1 of image 1 is of category [1], which is not listed"),
    ({"image_id": "1"}, "annotation 1 of image '1' has the image_id '1'; the images have ids like"),
    ({"keypoints": [1, 2, INF] * 3}, "annotation 1 of image 1 has keypoints with inf: they need"),
    ({"keypoints": [1, 2]}, "annotation 1 of image 1 has 2 numbers for 3 keypoints"),
    ({"num_keypoints": "3"}, "annotation 1 of image 1 has the num_keypoints '3': it needs"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED)
def test_an_annotation_is_refused_by_name_in_training_and_by_the_doctor(tmp_path, fields, text):
    content = tiny_coco()
    content["annotations"][0] |= fields
    name = write_tiny_coco(tmp_path, content)
    with pytest.raises(UserError) as error:
        get_dataset(name).records()
    assert str(error.value).startswith(f"{tmp_path}/a.json: {text}")
    assert len(str(error.value)) - len(str(tmp_path)) <= 300
    (report,) = doctor(name, None, *TWO).values()
    assert [found for _, found in problems(report)][0].startswith(text)


def assert_named_by_reader_and_doctor(folder, content, text):
    """The first that both say of a file begins with `text`."""
    name = write_tiny_coco(folder, content)
    with pytest.raises(UserError) as error:
        get_dataset(name).records()
    assert str(error.value).startswith(f"{folder}/a.json: {text}")
    (report,) = doctor(name, None, *TWO).values()
    assert [found for _, found in problems(report)][0].startswith(text)


@pytest.mark.parametrize(
    ("section", "entry", "text"),
    [
        ("images", {"id": 1}, "image 1 is listed twice"),
        ("images", {"id": "3"}, "the image ids 1 and '3' are a number and a text: use one"),
        ("images", {"id": 2**60}, "an id of the image entries is 1152921504606846976, no whole"),
        ("images", {"id": 3, "file_name": None}, "an image lacks file_name"),
        ("images", {"id": 3, "file_name": "a\0b"}, "image 3 has the file_name 'a\\x00b': name"),
        ("images", {"id": 3, "file_name": "a" * 300}, f"image 3 has the file_name '{'a' * 59}..."),
        ("images", {"id": 3, "height": "96"}, "image 3 has a height and width of ['96', 128]"),
        ("images", {"id": 3, "height": 10**9}, "image 3 has a height and width of [1000000000, 12"),
        ("images", None, "image number 3 is None, not an entry"),
        ("categories", {"id": 3, "name": 7}, "category 3 has the name 7, which is no text"),
        ("categories", {"id": 3, "name": None}, "category 3 has the name None, which is no text"),
        ("categories", {"id": 3, "name": "red"}, "the categories 1, 3 are all called 'red'"),
        ("categories", {"id": "3"}, "the category ids 1 and '3' are a number and a text"),
        ("categories", {"id": 3, "keypoints": 4}, "category 3 has the keypoints 4, which are not"),
        ("categories", None, "category number 3 is None: it needs id and name"),
        ("annotations", None, "annotation 5 of the file is None, not an entry"),
    ],
)
def test_an_entry_is_refused_by_name(tmp_path, section, entry, text):
    content = tiny_coco()
    plain = {**content[section][0], "name": "blue"}
    content[section].append(entry if entry is None else plain | entry)
    assert_named_by_reader_and_doctor(tmp_path, content, text)


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ("categories", "name", "category number 1 is {'id': 1, 'key"),
        ("categories", "id", "category number 1 is {'name': 'red', 'key"),
        ("images", "id", "an image lacks id: {'file_name': '1.jpg'"),
        ("annotations", "category_id", "annotation 1 of image 1 is of category None, which is not"),
        ("annotations", "image_id", "annotation 1 of image '?' has the image_id None; the images"),
        ("annotations", "bbox", "annotation 1 of image 1 has the bbox None: it needs four finite"),
    ],
)
def test_an_entry_that_lacks_a_key_is_named(tmp_path, section, key, text):
    content = tiny_coco()
    del content[section][0][key]
    assert_named_by_reader_and_doctor(tmp_path, content, text)


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_a_section_that_is_no_list(tmp_path, section):
    name = write_tiny_coco(tmp_path, tiny_coco() | {section: None})
    with pytest.raises(UserError, match=f"a.json is not in COCO's .*: its {section} are None, not"):
        get_dataset(name)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 100_000, '"x"', '{"images": 1'])
def test_what_is_no_coco_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json"):
        get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"cannot read .*a\.json: it is no regular file"):
        get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")


def test_null_is_as_absent_and_a_byte_order_mark_is_read(tmp_path):
    content = tiny_coco()
    for annotation in content["annotations"]:
        annotation |= dict.fromkeys(("id", "area", "iscrowd", "keypoints", "segmentation"))
    for image in content["images"]:
        image |= {"height": None, "width": None}
    content["categories"][0] |= {"keypoints": None, "skeleton": None}
    name = write_tiny_coco(tmp_path, content)
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, _ = get_dataset(name).records()
    assert (first["height"], first["width"]) == (96, 128)
    assert first["annotations"][0] == {"bbox": [5, 8, 35, 48], "category_id": 0, "iscrowd": 0}
    assert problems(doctor(name, None, *TWO)[name]) == []


@pytest.mark.parametrize(("value", "quarter_turn"), [(6, True), (8, True), (3, False), (99, False)])
def test_a_photograph_on_its_side_whose_size_the_file_does_not_give(tmp_path, value, quarter_turn):
    """Records, doctor, transforms and drawing see it upright; a value out of 1..8 means upright."""
    content = tiny_coco()
    for image in content["images"]:
        del image["height"], image["width"]
    name = write_tiny_coco(tmp_path, content)
    exif = Image.Exif()
    exif[0x0112] = value
    Image.new("RGB", (96, 128) if quarter_turn else (128, 96)).save(tmp_path / "1.jpg", exif=exif)
    record, _ = get_dataset(name).records()
    assert (record["height"], record["width"]) == (96, 128)
    assert problems(doctor(name, None, *TWO)[name]) == []
    assert read_upright(record["file_name"]).size == (128, 96)
    assert visualize.read_image(record).shape[-2:] == (96, 128)


def test_sizes_in_floats_are_whole_numbers(tmp_path):
    content = tiny_coco()
    content["images"][0] |= {"height": 96.0, "width": 128.0}
    first, _ = get_dataset(write_tiny_coco(tmp_path, content)).records()
    assert repr((first["height"], first["width"])) == "(96, 128)"


def test_lines_of_a_skeleton_that_has_no_such_keypoint_are_left_out(tmp_path):
    content = tiny_coco()
    content["categories"][0]["skeleton"] = [[1, 2], [2, 9], None, [0, 1], [2, 3]]
    name = write_tiny_coco(tmp_path, content)
    assert get_dataset(name).skeleton == ((0, 1), (1, 2))
    found = [text for _, text in problems(doctor(name, None, *TWO)[name])]
    assert found[0] == "category 1: its skeleton has [2, 9], which are not two of its keypoints"


def test_what_a_model_learns_is_asked_of_every_object(tmp_path):
    content = tiny_coco()
    one, two, three, _ = content["annotations"]
    one["segmentation"], two["segmentation"] = [], RLE
    three["keypoints"] = [1, 2, 2]
    dataset = get_dataset(write_tiny_coco(tmp_path, content))
    dataset.records()
    for wanted, message in (
        (Wanted(masks=True), "annotation 1 of image 1 has no mask, and MODEL.MASK_ON is True"),
        (Wanted(keypoints=3), "annotation 3 of image 2 has 3 numbers for 3 keypoints"),
    ):
        with pytest.raises(UserError, match=message):
            dataset.records(wanted=wanted)
    one["segmentation"] = RLE
    dataset = get_dataset(write_tiny_coco(tmp_path, content))
    dataset.records(wanted=Wanted(masks=True))
    with pytest.raises(UserError, match="annotation 1 of image 1 .* INPUT.MASK_FORMAT bitmask"):
        dataset.records(wanted=Wanted(masks=True, polygons=True))


def test_the_doctor_tells_ids_of_several_objects_from_objects_listed_twice(tmp_path):
    content = tiny_coco()
    for annotation in content["annotations"]:
        annotation["id"] = annotation["category_id"]  # anew in each image
    report = doctor(write_tiny_coco(tmp_path, content), None, *TWO).popitem()[1]
    assert problems(report) == []
    assert report.notes == ["2 annotation ids stand for several objects; scoring renumbers them"]
    content["annotations"][2] = content["annotations"][0]
    report = doctor(write_tiny_coco(tmp_path, content), None, *TWO).popitem()[1]
    assert problems(report) == [("list", "annotation 1 is listed 2 times")]


KEYPOINTS = (*TWO, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3,
             "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1])  # fmt: skip


def test_no_object_with_keypoints(tmp_path):
    content = tiny_coco()
    name = write_tiny_coco(tmp_path, content)
    assert problems(doctor(name, None, *KEYPOINTS)[name]) == []
    for annotation in content["annotations"]:
        annotation["keypoints"] = [0] * 9
    found = problems(doctor(write_tiny_coco(tmp_path, content), None, *KEYPOINTS)[name])
    assert any("keypoints" in text for _, text in found), found


def test_run_lengths_where_polygons_are_read(tmp_path):
    content = tiny_coco()
    content["annotations"][2]["segmentation"] = RLE
    name = write_tiny_coco(tmp_path, content)
    masks = (*TWO, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT")
    assert problems(doctor(name, None, *masks, "bitmask")[name]) == []
    ((_, text),) = problems(doctor(name, None, *masks, "polygon")[name])
    assert text.startswith("annotation 3 of image 2 ")
    assert "INPUT.MASK_FORMAT bitmask" in text


def test_only_crowds(tmp_path):
    content = tiny_coco()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    report = doctor(write_tiny_coco(tmp_path, content), None, *TWO).popitem()[1]
    assert ["holds no annotated image" in text for _, text in problems(report)] == [True]


def test_memory_stays_flat(tmp_path):
    """A mask to infinity, an RLE and an image of 10^18 pixels: nothing is made of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for target, fields in (
        ("annotations", {"segmentation": [[0, 0, INF, 0, 0, INF]]}),
        ("annotations", {"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}}),
        ("images", {"height": 10**9, "width": 10**9}),
    ):
        content = tiny_coco()
        content[target][0] |= fields
        with pytest.raises(UserError, match=r"a\.json: "):
            get_dataset(write_tiny_coco(tmp_path, json.loads(json.dumps(content)))).records()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
