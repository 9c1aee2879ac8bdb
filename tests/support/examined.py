"""What the doctor's tests share: run it on named sets, and take its findings apart."""

from paths import CONFIGS

from moco_det.config.loading import load_config
from moco_det.dataset_doctor import examine


def doctor(train, test=None, *opts, config="Base-RCNN-FPN-BN", limit=None):
    """The report of each data set."""
    names = [train] if test is None else [train, test]
    data = ("DATASETS.TRAIN", repr((names[0],)), "DATASETS.TEST", repr((names[-1],)))
    cfg = load_config(CONFIGS / f"{config}.yaml", [*data, *map(str, opts)])
    return {report.name: report for report in examine(cfg, limit)}


def problems(report):
    return [(problem.check, problem.text) for problem in report.problems]
