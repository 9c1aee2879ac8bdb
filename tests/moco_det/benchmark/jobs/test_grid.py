"""The grid: what is run for which table; the papers' numbers, entry by entry."""

from pathlib import Path

import pytest
import yaml
from paths import CONFIGS, EXPERIMENTS
from recording import FOLDER

from moco_det.benchmark.jobs.grid import FOLDER as DATA
from moco_det.benchmark.jobs.grid import load_grid
from moco_det.common.errors import UserError

GOLDEN = yaml.safe_load((FOLDER / "paper_transfer.yaml").read_text())

# (table, part) -> where its numbers are in experiments.yaml
SOURCES = {
    ("2a", 0): ("transfer", "table2a"),
    ("2b", 0): ("transfer", "table2b"),
    ("3", 0): ("transfer", "table3_dc5"),
    ("3", 1): ("transfer", "table3_c4"),
    ("4", 0): ("transfer", "table4"),
    ("5a", 0): ("transfer", "table5a"),
    ("5b", 0): ("transfer", "table5b"),
    ("5c", 0): ("transfer", "table5c"),
    ("5d", 0): ("transfer", "table5d"),
    ("6-keypoint", 0): ("transfer", "table6_keypoint"),
    ("6-densepose", 0): ("transfer", "table6_densepose"),
    ("6-lvis", 0): ("transfer", "table6_lvis"),
    ("6-cityscapes-instance", 0): ("transfer", "table6_cityscapes_instance"),
    ("6-semantic", 0): ("transfer", "table6_cityscapes_semantic"),
    ("6-semantic", 1): ("transfer", "table6_voc_semantic"),
    ("A1b", 0): ("transfer", "tableA1b"),
    ("A4", 0): ("transfer", "lvis_ablation_A4", "1x"),
    ("A4", 1): ("transfer", "lvis_ablation_A4", "2x"),
    ("v2-1", 0): ("ablations_v2", "table1"),
}
# experiments.yaml's names of rows, where they are others
ROWS = {
    "supervised_tuned_bn": "supervised",
    "v1": "moco_in1m",
    "mlp": "v2_mlp",
    "aug": "v2_aug",
    "mlp_aug": "v2_mlp_aug",
    "mlp_aug_cos": "v2_mlp_aug_cos",
    "mlp_aug_cos_800": "v2_mlp_aug_cos_800",
}
# paper_transfer.yaml's
GOLDEN_ROWS = {"moco_v2_200": "v2_mlp_aug_cos", "moco_v2_800": "v2_mlp_aug_cos_800"}
TASKS = {"bb": "bbox", "mk": "segm", "kp": "keypoints", "dp": "densepose_gps"}
VOC_COLUMNS = ["bb AP50", "bb AP", "bb AP75"]  # where experiments.yaml says so in its head alone
COCO_COLUMNS = ["bb AP", "bb AP50", "bb AP75", "mk AP", "mk AP50", "mk AP75"]


@pytest.fixture(scope="module")
def grid():
    return load_grid()


@pytest.fixture(scope="module")
def facts():
    if not EXPERIMENTS.is_file():
        pytest.skip(f"{EXPERIMENTS} is absent (set MOCO_DET_EXPERIMENTS to the file)")
    return yaml.safe_load(EXPERIMENTS.read_text())


def parts(grid):
    return {
        (name, index): part
        for name, table in grid.tables.items()
        for index, part in enumerate(table.parts)
    }


def found(entry):
    """{row of the grid: numbers} of an entry of experiments.yaml."""
    if "supervised" in entry and isinstance(entry["supervised"], dict):  # MoCo v2's table 1
        return {ROWS.get(k, k): [v["top1"], *v["voc"]] for k, v in entry.items()}
    rows = {k: v for k, v in entry.items() if isinstance(v, list) and isinstance(v[0], float)}
    return {ROWS.get(name, name): numbers for name, numbers in rows.items()}


def test_every_part_has_a_source(grid):
    assert set(parts(grid)) == set(SOURCES)


@pytest.mark.parametrize("key", SOURCES, ids=str)
def test_numbers_are_the_papers_entry_by_entry(grid, facts, key):
    part, entry = parts(grid)[key], facts
    for name in SOURCES[key]:
        entry = entry[name]
    assert part.published == found(entry)
    assert entry.get("config", part.experiment.name) == part.experiment.name
    assert entry.get("iterations", part.experiment.iterations) == part.experiment.iterations
    parent = facts["transfer"]["lvis_ablation_A4"] if key[0] == "A4" else entry
    if "trials" in parent:
        assert part.experiment.trials == parent["trials"]
    columns = parent.get("columns", VOC_COLUMNS if len(part.columns) != 6 else COCO_COLUMNS)
    assert [m for m in part.columns.values() if m] == [metric(column) for column in columns]


def metric(column):
    """ "mk AP50" -> "segm/AP50"."""
    task, _, name = column.rpartition(" ")
    return f"{TASKS[task]}/{name}" if task else "sem_seg/mIoU"


def test_no_published_table_is_left_out(facts):
    used = {source[:2] for source in SOURCES.values()}
    classification = {"inaturalist2018_A6", "imagenet_finetune_A7"}  # no detectors
    assert {("transfer", name) for name in facts["transfer"]} - used == {
        ("transfer", name) for name in classification
    }


@pytest.mark.parametrize("experiment", GOLDEN)
def test_numbers_are_those_that_the_configs_are_held_to(grid, experiment):
    """Where experiments.yaml is absent too: paper_transfer.yaml has most of them."""
    published = {}
    for part in parts(grid).values():
        if part.experiment.name == experiment:
            width = len(GOLDEN[experiment]["columns"])
            published |= {row: numbers[-width:] for row, numbers in part.published.items()}
    golden = GOLDEN[experiment]["results"]
    golden = {GOLDEN_ROWS.get(name, name): numbers for name, numbers in golden.items()}
    assert golden.items() <= published.items()
    batch, _, iterations, _ = GOLDEN[experiment]["solver"]
    found = next(p.experiment for p in parts(grid).values() if p.experiment.name == experiment)
    assert (found.batch, found.iterations) == (batch, iterations)


def test_every_row_and_config_exists(grid):
    for part in parts(grid).values():
        assert set(part.published) <= set(grid.rows)
        assert part.reference is None or part.reference in part.published
        for row in part.published:
            ending = grid.rows[row].config or "moco"
            assert part.experiment.config_file(CONFIGS, ending).is_file(), (part, row)


def test_tables_by_name_and_by_beginning(grid):
    assert [table.name for table in grid.select(["2b"])] == ["2b"]
    assert [table.name for table in grid.select(["5", "2a"])] == ["5a", "5b", "5c", "5d", "2a"]
    assert [table.name for table in grid.select(["6"])][0] == "6-keypoint"
    assert len(grid.select([])) == len(grid.tables)
    with pytest.raises(UserError, match="no table '7'"):
        grid.select(["7"])


def names(grid, tables, weights, trials=None):
    runs = grid.runs(grid.select(tables), weights, trials, CONFIGS)
    return [run.name for run in runs]


def test_a_run_that_two_tables_share_is_one(grid):
    weights = {"moco_in1m": Path("a.pkl")}
    both = names(grid, ["2b", "v2-1"], weights, [1])
    assert both == [f"voc_R50_C4_24k/{row}/trial1" for row in ("random", "supervised", "moco_in1m")]
    assert names(grid, ["2b"], weights, [1]) == both


def test_trials_are_the_papers_unless_given_and_the_first_come_first(grid):
    assert names(grid, ["5a"], {}) == [
        f"coco_R50_FPN_1x/{r}/trial1" for r in ("random", "supervised")
    ]
    runs = names(grid, ["2b"], {})
    assert len(runs) == 10
    assert [run[-1] for run in runs] == ["1", "1", "2", "2", "3", "3", "4", "4", "5", "5"]


def test_a_named_checkpoint_runs_where_the_paper_has_its_row_and_an_own_one_everywhere(grid):
    weights = {"memory_bank": Path("m.pkl"), "mine": Path("x.pkl")}
    runs = names(grid, ["2a", "3"], weights, [1])
    assert set(runs) == {
        "voc_R50_DC5_24k/random/trial1",
        "voc_R50_DC5_24k/supervised/trial1",
        "voc_R50_DC5_24k/mine/trial1",
        "voc_R50_DC5_24k/memory_bank/trial1",
        "voc_R50_C4_24k/memory_bank/trial1",
        "voc_R50_C4_24k/mine/trial1",
    }


def test_commands_differ_by_row_in_config_and_weights(grid):
    weights = {"moco_in1m": Path("a.pkl")}
    runs = {r.row: r for r in grid.runs(grid.select(["2b"]), weights, [3], CONFIGS, ["A", "1"])}
    assert runs["random"].config_file.name == "voc_R50_C4_24k_random.yaml"
    assert runs["random"].options == ("A", "1")
    assert runs["moco_in1m"].config_file.name == "voc_R50_C4_24k_moco.yaml"
    assert runs["moco_in1m"].options == ("A", "1", "MODEL.WEIGHTS", "a.pkl")
    assert {run.trial for run in runs.values()} == {3}


def test_supervised_weights_may_be_given_too(grid):
    """torchvision's want the input of the `_moco` config."""
    weights = {"supervised": Path("r50.pkl")}
    run = grid.runs(grid.select(["4"]), weights, [1], CONFIGS)[0]
    assert run.config_file.name == "voc_R50_C4_9k_moco.yaml"
    assert run.options == ("MODEL.WEIGHTS", "r50.pkl")


def test_the_toy_grid_has_the_tasks_and_its_files(tmp_path):
    grid = load_grid(DATA / "quick.yaml", data=tmp_path)
    runs = grid.runs(grid.select([]), {"moco": Path("m.pkl")}, None, CONFIGS)
    assert len(runs) == 16
    assert all(run.config_file.is_file() for run in runs)
    assert all(str(tmp_path) in " ".join(run.options) for run in runs)
    metrics = {m.split("/")[0] for p in parts(grid).values() for m in p.columns.values()}
    assert metrics == {"bbox", "segm", "keypoints", "sem_seg"}


def test_gpu_hours_by_hand(grid):
    # 24000 iterations of 0.537 s on 8 GPUs
    experiment = parts(grid)["2b", 0].experiment
    assert experiment.gpu_hours == pytest.approx(24000 * 0.537 * 8 / 3600)
    assert parts(grid)["2a", 0].experiment.gpu_hours is None
