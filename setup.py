from setuptools import find_packages, setup

# The official metrics of these data sets, which `moco_det.evaluation` runs.
LVIS = ["lvis>=0.5.3"]
CITYSCAPES = ["cityscapesscripts>=2.2"]
DENSEPOSE = ["scipy"]  # reads the files of the body model, too
# Reads tar shards for pretraining.
WEBDATASET = ["webdataset>=1.0"]

# Submits the runs of tools/reproduce.py.
SLURM = ["submitit>=1.5"]

setup(
    name="moco_det",
    version="0.1.0",
    description="MoCo pretraining and its transfer to detection: from images to a Detectron2 table",
    packages=find_packages(include=["moco_det", "moco_det.*", "pretrain", "pretrain.*"]),
    package_data={
        "moco_det": ["config/*.yaml", "datasets/*.yaml"],
        "moco_det.benchmark": ["jobs/*.yaml", "report/templates/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy",
        "fvcore>=0.1.5.post20211023",  # the first whose _BASE_ takes a list
        "pycocotools>=2.0.7",
        # opencv-python without its window code: the same `cv2`, and no libGL is needed.
        "opencv-python-headless>=4.8",
        "pillow>=10.1",  # its default font in any size
        "pyyaml",
        "jinja2",
        "tabulate",
        "tensorboard",
    ],
    extras_require={
        "lvis": LVIS,
        "cityscapes": CITYSCAPES,
        "densepose": DENSEPOSE,
        "webdataset": WEBDATASET,
        "slurm": SLURM,
        "test": [
            *["pytest", "pytest-xdist>=3.2", "ruff", "scipy", "scikit-learn"],
            *LVIS,
            *CITYSCAPES,
            *WEBDATASET,
            *SLURM,
        ],
    },
)
