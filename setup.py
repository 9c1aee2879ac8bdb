from setuptools import find_packages, setup

setup(
    name="moco_det",
    version="0.1.0",
    description="Momentum Contrast pretraining and its detection transfer, images to table",
    packages=find_packages(include=["moco_det", "moco_det.*", "pretrain"]),
    package_data={"moco_det.benchmark": ["*.css"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy",
        "fvcore",
        "pycocotools>=2.0.7",
        # opencv-python without its window code: the same `cv2`, and no libGL is needed.
        "opencv-python-headless>=4.8",
        "pillow",
        "pyyaml",
        "tabulate",
        "tensorboard",
    ],
    extras_require={"test": ["pytest", "ruff", "scipy", "scikit-learn"]},
)
