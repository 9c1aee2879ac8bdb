"""The dataset doctor: everything that is wrong with the data sets of a config, before a run.

The readers of `moco_det.datasets` tell a `Problems` what they find. A run's stops at the first
thing that cannot be used, and passes over what is left out, such as a box without area; the doctor
hands them its `Report`, which collects all of it. So it has no checks of files of its own, but that
it decodes images. Checks of a config's keys belong in `moco_det.config.checks`. Start with
`examination.examine`: one `Report` for each data set.
"""

from moco_det.dataset_doctor.examination import examine
from moco_det.dataset_doctor.report import Report, describe, table

__all__ = ["Report", "describe", "examine", "table"]
