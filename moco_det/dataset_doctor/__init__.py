"""The dataset doctor: everything that is wrong with the data sets of a config, before a run.

Where the classes of `moco_det.datasets` stop at the first thing that they cannot read and leave out
boxes without area, as a run needs it, this reads the same files to the end and reports all that it
finds. Checks of a config's keys belong in `moco_det.config.checks`. Start with
`examination.examine`: one `Report` for each data set, filled by the checks of its kind of files.
"""

from moco_det.dataset_doctor.examination import examine
from moco_det.dataset_doctor.report import Report, describe, table

__all__ = ["Report", "describe", "examine", "table"]
