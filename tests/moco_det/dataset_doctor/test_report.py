"""How the doctor's findings are printed."""

from examined import doctor
from tiny_voc import write_tiny_voc

from moco_det.common.errors import LONGEST
from moco_det.dataset_doctor import describe, table


def test_description_lists_some_of_each_kind_and_counts_the_rest(tmp_path):
    voc = write_tiny_voc(tmp_path / "voc")
    for number in range(5):
        (voc / f"JPEGImages/{number:03d}.jpg").write_bytes(b"")
    (report,) = doctor(f"voc:{voc}:train").values()
    text = describe(report, 2)
    assert text.count("cannot be decoded") == 2
    assert "image: and 3 more" in text
    assert describe(report, 0).count("cannot be decoded") == 5
    assert f"| {report.name} |" in table([report])


def test_a_long_name_does_not_stretch_the_table():
    reports = doctor("9" * 500).values()
    lines = [*table([*reports]).splitlines(), *describe(*reports, 0).splitlines()]
    assert max(map(len, lines)) <= LONGEST
