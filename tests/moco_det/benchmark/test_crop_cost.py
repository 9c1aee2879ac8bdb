"""What a step of multi-crop is held against; how long it takes is no test."""

from moco_det.benchmark import crop_cost
from moco_det.benchmark.crop_cost import PAPER, Crops, table_rows, time_crops


def test_work_is_that_of_the_passes():
    """Of 224 x 224 pixels one forward and backward pass (3) and one forward pass (1)."""
    assert Crops(224).work == 4 * 50176
    assert Crops(160, 96, 4).work == 4 * 25600 + 4 * 3 * 9216
    assert [str(form) for form in PAPER] == [
        "2 x 224", "2 x 160 + 4 x 96", "2 x 160 + 4 x 96, neighbours",
    ]  # fmt: skip


def test_the_first_predicts_the_others():
    rows = table_rows({Crops(10): 0.4, Crops(10, 10, 2): 1.1})
    assert rows == [
        ["2 x 10", "400", "400", "1.000"],
        ["2 x 10 + 2 x 10", "1100", "1000", "1.100"],  # 10 passes where there were 4
    ]


def test_all_forms_take_their_steps(monkeypatch):
    seen = []

    def alternate(steps, rounds, clock):
        return {form: float(len(seen) or seen.append(step()) or 1) for form, step in steps.items()}

    monkeypatch.setattr(crop_cost, "alternate", alternate)
    tiny = [Crops(32, 16, 2, neighbours=3), Crops(32)]
    assert list(time_crops(tiny, "resnet18w0.25x", 4, "cpu", queue=12)) == tiny
    assert len(seen[0]) == 7  # with the neighbours' loss
    assert seen[0].isfinite().all()
