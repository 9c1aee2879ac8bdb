import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "moco_det" / "__init__.py").read_text())[1]


class BuildWithFolders(build_py):
    """A wheel also holds configs/ and tools/, within the package: see common/installation.py."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in self.folders():
                target = Path(self.build_lib, "moco_det", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(HERE / file), str(target))

    def get_source_files(self) -> list[str]:  # of a source distribution, which makes wheels, too
        return [*super().get_source_files(), *map(str, self.folders())]

    @staticmethod
    def folders() -> list[Path]:
        files = (file for name in ("configs", "tools") for file in (HERE / name).rglob("*.*"))
        wanted = (".py", ".yaml", ".md", ".svg")
        return sorted(file.relative_to(HERE) for file in files if file.suffix in wanted)


# The official metrics of these data sets, which `moco_det.evaluation` runs.
LVIS = ["faster-coco-eval>=1.7"]
CITYSCAPES = ["cityscapesscripts>=2.2"]
DENSEPOSE = ["scipy"]  # reads the files of the body model, too
# Reads tar shards for pretraining.
WEBDATASET = ["webdataset>=1.0"]

# pretrain/voc_svm.py; scipy reads the lists of Stanford Cars for pretrain/linear.py.
EVALUATION = ["scikit-learn>=1.3", "scipy"]

# Weights of the Hugging Face Hub, and the files that most of them are.
HUB = ["huggingface_hub>=0.23", "safetensors>=0.4"]

# On no package registry; it is compiled against the torch that is there, so pip must not isolate
# its build.
DETECTRON2 = ["detectron2 @ git+https://github.com/facebookresearch/detectron2.git"]

# Submits the runs of tools/reproduce.py.
SLURM = ["submitit>=1.5"]

setup(
    name="moco_det",
    version=VERSION,
    description="MoCo pretraining and its transfer to detection: from images to a Detectron2 table",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords=["MoCo", "momentum contrast", "self-supervised", "Detectron2", "object detection"],
    cmdclass={"build_py": BuildWithFolders},
    packages=find_packages(include=["moco_det", "moco_det.*", "pretrain", "pretrain.*"]),
    package_data={
        "moco_det": ["py.typed", "config/*.yaml", "datasets/*.yaml"],
        "moco_det.benchmark": ["jobs/*.yaml", "report/templates/*"],
    },
    entry_points={"console_scripts": ["moco-det = moco_det.__main__:main"]},
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
        "detectron2": DETECTRON2,
        "lvis": LVIS,
        "cityscapes": CITYSCAPES,
        "densepose": DENSEPOSE,
        "webdataset": WEBDATASET,
        "slurm": SLURM,
        "evaluation": EVALUATION,
        "parquet": ["pyarrow"],  # pretrain/embed.py
        "hub": HUB,
        "wandb": ["wandb>=0.16"],  # --log of pretrain/main.py and linear.py
        "mlflow": ["mlflow>=2.9"],
        "test": [
            *["pytest", "pytest-xdist>=3.2", "ruff", "scipy"],
            *EVALUATION,
            *LVIS,
            *CITYSCAPES,
            *WEBDATASET,
            *SLURM,
            *HUB,
            "timm",  # loads what tools/convert_to_d2.py has written for it
        ],
    },
)
