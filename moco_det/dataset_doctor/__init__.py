"""The dataset doctor: everything that is wrong with the data sets of a config, before a run.

Where the data set classes stop at the first thing that they cannot read and leave out boxes without
area, as a run needs it, this reads the same files to the end and reports all that it finds.
"""

from moco_det.dataset_doctor.examination import examine
from moco_det.dataset_doctor.report import Report, describe, table

__all__ = ["Report", "describe", "examine", "table"]
