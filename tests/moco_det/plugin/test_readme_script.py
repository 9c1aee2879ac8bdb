"""The script that the plugin's README shows, run as it stands there."""

import os
import re
import subprocess
import sys

import pytest
from tiny_voc import write_tiny_voc

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

SMALL = """SOLVER.MAX_ITER 2 SOLVER.STEPS (1,) SOLVER.IMS_PER_BATCH 2 TEST.PRECISE_BN.NUM_ITER 1
INPUT.MIN_SIZE_TRAIN (48,) INPUT.MIN_SIZE_TEST 48 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
MODEL.RPN.POST_NMS_TOPK_TEST 10 DATALOADER.NUM_WORKERS 0 MODEL.DEVICE cpu"""


def as_voc2007(root):
    """The tiny set under names and classes of PASCAL VOC's."""
    write_tiny_voc(root / "VOC2007")
    for path in (root / "VOC2007" / "Annotations").iterdir():
        text = path.read_text().replace(">bar<", ">bottle<").replace(">square<", ">tvmonitor<")
        path.write_text(text)
    return root


def test_the_script_in_the_readme_trains_the_paper_s_c4_detector(repository, tmp_path):
    readme = (repository / "moco_det/plugin/README.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    (tmp_path / "user_train_net.py").write_text(script)
    out = tmp_path / "out"
    own = ["DATASETS.TRAIN", "('voc_2007_train',)", "DATASETS.TEST", "('voc_2007_test',)"]
    done = subprocess.run(
        [
            *(sys.executable, tmp_path / "user_train_net.py", "--config-file"),
            *(repository / "configs" / "voc_R50_C4_24k_random.yaml", *SMALL.split(), *own),
            *("OUTPUT_DIR", out),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DETECTRON2_DATASETS": str(as_voc2007(tmp_path)),
            "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "model_final.pth").exists()
    assert "copypaste: AP,AP50,AP75" in done.stdout
