"""The grid: what is run for which table; the papers' numbers, entry by entry."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from paths import CONFIGS, EXPERIMENTS, REPOSITORY
from recording import FOLDER

from moco_det.benchmark.jobs.ablation import read_ablation
from moco_det.benchmark.jobs.encoder_runs import parsed
from moco_det.benchmark.jobs.grid import FOLDER as DATA
from moco_det.benchmark.jobs.grid import Experiment, FrozenRun, load_grid
from moco_det.common.errors import UserError
from pretrain.flags.pretraining import parse_pretraining

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
# Tables of classifiers: each has a test of its own.
CLASSIFIERS = {("1", 0), ("fig3", 0), ("A6", 0), ("A7", 0), ("v2-1-linear", 0), ("v2-2", 0)}
# Of the third paper, whose tables have a test of their own.
REVISITING = "Revisiting Contrastive Methods (arXiv:2106.05967)"
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
    revisiting = {key for key in parts(grid) if grid.tables[key[0]].source == REVISITING}
    assert set(parts(grid)) - revisiting == set(SOURCES) | CLASSIFIERS
    for key in CLASSIFIERS:
        assert parts(grid)[key].columns == {"top-1": "classification/top1"}


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
    classification = {"inaturalist2018_A6", "imagenet_finetune_A7"}  # tables A6 and A7
    assert {("transfer", name) for name in facts["transfer"]} - used == {
        ("transfer", name) for name in classification
    }


# -- classifiers ----------------------------------------------------------------------------------


def top1(grid, table):
    """{row: number} of a table of one column."""
    return {row: number for row, (number,) in parts(grid)[table, 0].published.items()}


def test_table_1_is_the_papers(grid, facts):
    """The rows of MoCo; the others from a transcript of the table, in its order."""
    encoders = {
        "R50": "moco_in1m", "RX50_32x8d": "moco_rx50", "R50w2x": "moco_r50w2x",
        "R50w4x": "moco_r50w4x",
    }  # fmt: skip
    found = top1(grid, "1")
    ours = {row: number for row, number in found.items() if not row.startswith("table1_")}
    entries = {encoders[name]: entry for name, entry in facts["pretrain"]["encoders_v1"].items()}
    assert ours == {row: entry["top1"] for row, entry in entries.items()}
    for row, entry in entries.items():
        assert row == "moco_in1m" or grid.rows[row].label.endswith(f" {entry['params_M']}M")
    transcript = EXPERIMENTS.parent / "papers/moco_slides.txt"
    if not transcript.is_file():
        pytest.skip(f"{transcript} is absent")
    section = transcript.read_text().split("### Compare with previous methods")[1]
    lines = re.findall(r"\t(\d+)\t(\d\d\.\d)", section.split("####")[0])
    shown = [
        (re.search(r"(\d+)M", grid.rows[row].label)[1] if row != "moco_in1m" else "24", str(number))
        for row, number in found.items()
    ]
    assert shown == lines and len(lines) == 20


def test_figure_3_has_what_the_text_states_and_nothing_else(grid, facts):
    """The other points are a drawing: silences."""
    stated = facts["ablations_v1"]["mechanism_linear_top1"]
    found = top1(grid, "fig3")
    assert {row: number for row, number in found.items() if number is not None} == {
        "moco_in1m": stated["moco"][65536],
        "memory_bank": stated["memory_bank"][65536],
        "memory_bank_nce_k4096": stated["memory_bank"]["nce_4096"],
        "moco_k4096": facts["ablations_v1"]["momentum_K4096_top1"][0.999],
    }
    assert len(found) == 14
    assert "does not state" in grid.tables["fig3"].note


def test_fine_tuning_is_as_published(grid, facts):
    """A.6 and A.7; the learning rate and that from scratch too."""
    for table, name in (("A6", "inaturalist2018_A6"), ("A7", "imagenet_finetune_A7")):
        entry, experiment = facts["transfer"][name], parts(grid)[table, 0].experiment
        numbers = {row: value[0] for row, value in found(entry).items() if len(value) == 1}
        assert top1(grid, table) == numbers
        runs = grid.runs(
            grid.select([table]), {}, [1], CONFIGS, checkpoints={"moco_in1m": Path("c.pth.tar")}
        )
        rates = {run.row: parsed(run).lr for run in runs}
        assert rates["moco_in1m"] == entry["lr"] and rates["random"] == entry["lr_from_scratch"]
        assert rates.get("supervised", entry["lr"]) == entry["lr"]
        assert experiment.epochs == entry.get("epochs", 100)


def test_mocos_second_paper_is_as_published(grid, facts):
    table1 = facts["ablations_v2"]["table1"]
    published = {ROWS.get(row, row): entry["top1"] for row, entry in table1.items()}
    assert top1(grid, "v2-1-linear") == published
    simclr = facts["ablations_v2"]["table2_simclr_top1"]
    assert top1(grid, "v2-2") == {
        "moco_in1m": published["moco_in1m"],
        "simclr_b256_200": simclr["b256_200ep"],
        "simclr_b8192_200": simclr["b8192_200ep"],
        "v2_mlp_aug_cos": published["v2_mlp_aug_cos"],
        "simclr_b4096_1000": simclr["b4096_1000ep"],
        "v2_mlp_aug_cos_800": published["v2_mlp_aug_cos_800"],
    }


def test_the_linear_protocol_is_the_command_s(grid):
    checkpoints = {"moco_r50w2x": Path("c.pth.tar")}
    (run,) = grid.runs(grid.select(["1"]), {}, None, CONFIGS, checkpoints=checkpoints)
    assert run.flags == {"arch": "resnet50w2x", "pretrained": "c.pth.tar"}
    assert parsed(run).epochs == run.experiment.epochs


def settings_of(words):
    """What pretrain/main.py makes of flags, less from which file; a cosine has no steps."""
    args = vars(parse_pretraining(["DATA", *words]))
    unused = {"recipe", "schedule"} if args["cos"] else {"recipe"}
    return {name: value for name, value in args.items() if name not in unused}


def test_rows_are_pretrained_as_the_ablations_grids_have_it(grid, monkeypatch):
    """One setting for both commands, and no other row of a grid than the paper's tables have."""
    monkeypatch.chdir(REPOSITORY)
    rows = {n: r for n, r in grid.rows.items() if r.pretrain and n not in revisiting_rows(grid)}
    ours = {name: settings_of(shlex.split(row.pretrain)) for name, row in rows.items()}
    assert all(ours[name]["arch"] == row.arch for name, row in rows.items())
    seen = set()
    for file in ("imagenet_mechanisms", "imagenet_v2", "imagenet_encoders"):
        for variant in read_ablation(CONFIGS / f"ablations/{file}.yaml").rows:
            wanted = settings_of(variant.flags)
            same = [name for name, settings in ours.items() if settings == wanted]
            assert len(same) == wanted["shuffle_bn"], variant  # without it, A.9, which is a figure
            seen |= set(same)
    assert seen == rows.keys() - {"simclr_b256_200"}


# -- "Revisiting Contrastive Methods" --------------------------------------------------------------

WITH_M, BEST = "coco_200_cc_m", "coco_200_cc_m_aug_nn"
COCO_800 = ("coco_800", "coco_800_cc", "coco_800_cc_aug", "coco_800_cc_aug_nn")


def across(grid, table):
    """{row: numbers of all parts, side by side}."""
    rows = grid.tables[f"revisiting_{table}"].rows(())
    return {
        row: [n for part in grid.tables[f"revisiting_{table}"].parts for n in part.published[row]]
        for row in rows
    }


def revisiting_rows(grid):
    tables = [table for table in grid.tables.values() if table.source == REVISITING]
    return {row for table in tables for row in table.rows(())} - {"random", "supervised"}


def test_revisiting_is_the_papers_entry_by_entry(grid, facts):
    facts = facts["revisiting"]
    by_images = facts["table2_linear_400ep"]
    assert across(grid, 2) == {f"{name}_400": numbers for name, numbers in by_images.items()} | {
        "in118k_lt_400": by_images["in118k_lt"],
    }
    names = {
        "random": "random", "moco": "coco_200", "mc": "coco_200_mc", "mc_cc": "coco_200_cc",
        "mc_cc_m": WITH_M, "mc_cc_m_aug": f"{WITH_M}_aug", "mc_cc_m_aug_nn": BEST,
    }  # fmt: skip
    assert across(grid, 4) == {names[k]: numbers for k, numbers in facts["table4_200ep"].items()}
    names |= {"moco_mc": "coco_200_mc"}
    names |= {
        name: f"revisiting_{name}" for name in ("densecl", "stc", "mast", "segsort", "ssl_hg")
    }
    davis = facts["table5_davis"]
    assert across(grid, 5) == {names[k]: [v["J"], v["F"]] for k, v in davis.items()}
    seven, twenty_one = facts["table6_segment_retrieval_voc"].values()
    assert across(grid, 6) == {names[k]: [seven[k], twenty_one.get(k)] for k in seven}
    standard, autoaugment, either = facts["table7_aug_voc_svm"].values()
    assert across(grid, 7) == {
        WITH_M: [standard],
        f"{WITH_M}_autoaugment": [autoaugment],
        f"{WITH_M}_aug": [either],
    }
    weights, counts = facts["table8_knn_voc"].values()
    rows = {f"coco_200_nn_w0{w * 10:.0f}": [n] for w, n in weights.items() if w in (0.1, 0.2, 0.8)}
    rows |= {f"coco_200_nn_k{k}": [n] for k, n in counts.items() if k != 20}
    assert counts[20] == weights[0.4]
    assert across(grid, 8) == rows | {WITH_M: [weights[0.0]], "coco_200_nn": [counts[20]]}
    names = {"random": "random", "moco": COCO_800[0], "cc": COCO_800[1], "cc_aug": COCO_800[2],
             "cc_aug_knn": COCO_800[3]}  # fmt: skip
    table9, others = across(grid, 9), ("revisiting_densecl", "revisiting_virtex")
    ours = {row: numbers for row, numbers in table9.items() if row not in others}
    assert ours == {names[k]: numbers for k, numbers in facts["table9_800ep"].items()}


def text_of(table, following):
    """The numbers of a table in the paper's text, in whichever order, and those in brackets."""
    transcript = EXPERIMENTS.parent / "papers/revisiting_contrastive.txt"
    if not transcript.is_file():
        pytest.skip(f"{transcript} is absent")
    section = transcript.read_text().split(f"Table {table}: ")[-1].split(following)[0]
    pairs = re.findall(r"(\d+\.\d+) \(([+−])(\d+\.\d+)\)", section)
    differences = [(float(n), float(f"{'-' * (sign == '−')}{d}")) for n, sign, d in pairs]
    return sorted(map(float, re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)", "", section)))), differences


def test_tables_that_only_the_text_has(grid):
    numbers, differences = text_of(3, "head h. The contrastive")
    found = across(grid, 3)
    assert sorted(n for row in found.values() for n in row if n is not None) == numbers
    base = found["in118k_400"]
    ours = [
        (number, round(number - first, 3))
        for name, row in found.items()
        for number, first in zip(row, base, strict=True)
        if name != "in118k_400" and number is not None
    ]
    assert sorted(ours) == sorted(differences) and len(ours) == 19
    numbers, _ = text_of(9, "CC: Constrained")
    shown = sorted(n for row in across(grid, 9).values() for n in row if n is not None)
    assert shown == numbers


def test_rows_of_revisiting_are_pretrained_as_published(grid, facts, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    protocol = facts["revisiting"]["protocol"]
    large, small = (protocol["multi_crop"][name] for name in ("large", "small"))
    neighbours = protocol["nearest_neighbours"]
    rows = {name: grid.rows[name] for name in revisiting_rows(grid) if grid.rows[name].pretrain}
    assert {name for name in revisiting_rows(grid) if name not in rows} == {
        f"revisiting_{name}" for name in ("densecl", "virtex", "mast", "stc", "segsort", "ssl_hg")
    }
    for name, row in rows.items():
        args = parse_pretraining(["DATA", *shlex.split(row.pretrain)])
        assert (args.lr, args.batch_size, args.moco_t) == (0.3, 256, 0.2)
        assert args.cos and args.mlp and args.aug_plus
        images, epochs, *parts = re.fullmatch(r"(\w+?)_(\d+)(?:_(.+))?", name).groups()
        assert row.images == {
            "coco": "COCO/train2017",
            "bdd100k": "BDD100K",
            "oi118k": "OPENIMAGES",
        }.get(images, "IMAGENET")
        assert args.list == (f"{images}.txt" if "118k" in images else None)
        assert args.epochs == int(epochs)
        parts = (parts[0] or "").split("_")
        crops = bool({"mc", "cc", "nn"} & set(parts))
        assert args.multi_crop == (small["number"] if crops else 0)
        assert args.image_size == (large["size"] if crops else 224)
        assert (args.small_size, args.small_scale) == (small["size"], small["scale"])
        assert args.constrained == (0.1 if crops and "mc" not in parts else 0)
        lowered = {"m", "nn"} & set(parts) or (epochs == "800" and "cc" in parts)
        assert args.moco_m == (protocol["multi_crop"]["momentum_lowered"] if lowered else 0.999)
        strong = "mix" if "aug" in parts else "autoaugment" if "autoaugment" in parts else "none"
        assert args.strong_aug == strong
        k = next((int(p[1:]) for p in parts if re.match(r"k\d", p)), neighbours["k"])
        weight = next((int(p[1:]) / 10 for p in parts if re.match(r"w\d", p)), None)
        assert args.nearest_neighbours == (k if "nn" in parts else 0)
        assert args.nn_weight == (weight or neighbours["weight"])
        label = grid.rows[name].label
        assert f"{epochs} ep." in label and (k == 20 or f"k = {k}" in label)
        assert weight is None or f"λ = {weight}" in label


def test_frozen_features_are_evaluated_of_the_checkpoint_itself(grid):
    checkpoints = {"coco_800": Path("c.pth.tar"), "mine": Path("m.pth.tar")}
    weights = {name: Path(f"{name}.pkl") for name in checkpoints}
    runs = grid.runs(
        grid.select(["revisiting_9"]), weights, None, CONFIGS, checkpoints=checkpoints,
        options=["MODEL.DEVICE", "cpu"], flags={"epochs": 3},
    )  # fmt: skip
    frozen = {run.name: run for run in runs if isinstance(run, FrozenRun)}
    assert set(frozen) == {
        "voc_svm/coco_800/trial1", "voc_svm/mine/trial1",
        "davis/random/trial1", "davis/coco_800/trial1", "davis/mine/trial1",
    }  # fmt: skip
    run = frozen["davis/coco_800/trial1"]
    assert run.flags == {"arch": "resnet50", "pretrained": "c.pth.tar"} and run.cpu
    assert run.changed == {}  # --linear is of classifiers
    assert frozen["davis/random/trial1"].flags["pretrained"] == "random"
    linear = [run for run in runs if run.experiment.name == "places365_linear"]
    assert {parsed(run).dataset for run in linear} == {"places365"}
    assert {run.flags["epochs"] for run in linear} == {3}


def test_classifiers_run_from_the_checkpoint_itself(grid):
    weights, checkpoints = {"mine": Path("m.pkl")}, {"mine": Path("m.pth.tar")}
    tables = grid.select(["A7", "2b"])
    more = {"checkpoints": checkpoints, "flags": {"amp": "bf16"}}
    runs = {
        r.name: r for r in grid.runs(tables, weights, [2], CONFIGS, ["MODEL.DEVICE", "cpu"], **more)
    }
    assert set(runs) == {
        f"{experiment}/{row}/trial2"
        for experiment, rows in (
            ("imagenet_finetune", ("random", "mine")),
            ("voc_R50_C4_24k", ("random", "supervised", "mine")),
        )
        for row in rows
    }
    run = runs["imagenet_finetune/mine/trial2"]
    assert run.flags["pretrained"] == "m.pth.tar" and run.flags["amp"] == "bf16" and run.cpu
    assert runs["voc_R50_C4_24k/mine/trial2"].options[-1] == "m.pkl"


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
        for row in part.published if isinstance(part.experiment, Experiment) else ():
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
    assert len(runs) == 8
    assert all(run.config_file.is_file() for run in runs)
    assert all(str(tmp_path) in " ".join(run.options) for run in runs)
    metrics = {m.split("/")[0] for p in parts(grid).values() for m in p.columns.values()}
    assert metrics == {"bbox", "segm", "sem_seg"}


def test_gpu_hours_by_hand(grid):
    # 24000 iterations of 0.537 s on 8 GPUs
    experiment = parts(grid)["2b", 0].experiment
    assert experiment.gpu_hours == pytest.approx(24000 * 0.537 * 8 / 3600)
    assert parts(grid)["2a", 0].experiment.gpu_hours is None
