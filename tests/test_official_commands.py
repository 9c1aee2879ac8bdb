"""The commands of facebookresearch/moco's READMEs, run through ours on a handful of images.

Words are the READMEs', but for paths, for a free port, and for the flags that make them tiny. Files
are looked for under the names that the READMEs give them.
"""

import shlex

import numpy as np
import pytest
import torch
from commands import run
from paths import CONFIGS
from PIL import Image
from tiny_voc import write_tiny_voc

from moco_det.common.launch import free_local_url

# README.md, "Unsupervised Training": MoCo v1, v2, and the note on 4 GPUs.
PRETRAIN = """
    -a resnet50
    --lr 0.03
    --batch-size 256
    --dist-url 'tcp://localhost:10001' --multiprocessing-distributed --world-size 1 --rank 0
    FOLDER
"""
V2 = "--mlp --moco-t 0.2 --aug-plus --cos"
FOUR_GPUS = "--lr 0.015 --batch-size 128"
# README.md, "Linear Classification".
LINEAR = """
    -a resnet50
    --lr 30.0
    --batch-size 256
    --pretrained OUTPUT/checkpoint_0199.pth.tar
    --dist-url 'tcp://localhost:10001' --multiprocessing-distributed --world-size 1 --rank 0
    FOLDER
"""
# detection/README.md.
CONVERT = "OUTPUT/checkpoint_0199.pth.tar output.pkl"
DETECT = """
    --config-file CONFIGS/voc_R50_C4_24k_moco.yaml
    --num-gpus 8 MODEL.WEIGHTS ./output.pkl
"""

# The last of 200 epochs, of one step. A ResNet-50 all the same, which the detector needs.
TINY = "--start-epoch 199 --image-size 32 -b 8 -j 0 --seed 0 --moco-k 8 --knn-every 0"
TINY_DETECTOR = (
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 "
    "MODEL.RPN.POST_NMS_TOPK_TEST 5 INPUT.MIN_SIZE_TEST 48 INPUT.MIN_SIZE_TRAIN (48,) "
    "DATALOADER.NUM_WORKERS 0 SOLVER.MAX_ITER 1 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 "
    "TEST.PRECISE_BN.NUM_ITER 1 DATASETS.TRAIN ('voc_2007_train',) "
    "DATASETS.TEST ('voc_2007_test',) MODEL.DEVICE cpu"
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with train and val folders of images, and VOC 2007 below datasets/."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("n01440764", "n01443537"):
            (tmp_path / "imagenet" / part / label).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
                name = f"{label}_{number}.JPEG"
                Image.fromarray(pixels).save(tmp_path / "imagenet" / part / label / name)
    voc = write_tiny_voc(tmp_path / "datasets" / "VOC2007", images=6)
    for path in (voc / "Annotations").iterdir():
        text = path.read_text().replace(">bar<", ">bottle<").replace(">square<", ">tvmonitor<")
        path.write_text(text)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(command: str, output: str = "output") -> list[str]:
    """The command's words with our paths, as a shell passes them on."""
    command = command.replace("tcp://localhost:10001", free_local_url())
    command = command.replace("FOLDER", "imagenet").replace("OUTPUT", output)
    return shlex.split(command.replace("CONFIGS", str(CONFIGS)))


def done(path: str, *arguments: str):
    ended = run(path, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def test_the_commands_lead_from_images_to_an_ap(workplace):
    done("pretrain/main.py", *words(f"{PRETRAIN} {TINY}"))
    state = torch.load("output/checkpoint_0199.pth.tar", weights_only=True)
    assert state["epoch"] == 200

    tiny = words("--image-size 32 -b 8 -j 0 --epochs 1 --output lincls")
    linear = done("pretrain/linear.py", *words(LINEAR), *tiny)
    assert "val top-1" in linear.stdout

    done("tools/convert_to_d2.py", *words(CONVERT))
    gpus = ["--num-gpus", "8"]
    detect = words(DETECT) + TINY_DETECTOR.split()
    at = detect.index(gpus[0])
    assert detect[at : at + 2] == gpus
    del detect[at : at + 2]  # here is a CPU
    trained = done("tools/train_net.py", "--engine", "native", *detect)
    assert "AP50" in trained.stdout
    assert torch.load("output/model_final.pth", weights_only=True)["iteration"] == 0


@pytest.mark.parametrize("flags", [V2, FOUR_GPUS], ids=["v2", "four-gpus"])
def test_the_variants_of_pretraining(workplace, flags):
    narrow = "-a resnet18w0.25x"
    done("pretrain/main.py", *words(f"{PRETRAIN} {flags} {TINY} {narrow}"))
    assert (workplace / "output/checkpoint_0199.pth.tar").exists()
