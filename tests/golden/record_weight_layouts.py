"""Record what the checkpoints of others hold, by building their networks from their public code.

    python tests/golden/record_weight_layouts.py CHECKOUTS

CHECKOUTS has a folder for each of SOURCES, the repository at that commit. The networks are built on
the meta device, so that nothing but names comes of it; packages that they import and that are not
installed are stood in for. weight_layouts.yaml keeps of each checkpoint

    title     the layout that it is to be recognised as
    source    repository, commit and files
    built     whether this script records resnets and others; else they were read in the files
    entry     where in the file the state_dict is
    beside    entries next to it
    taken     the prefix of the ResNet that is to be taken
    resnets   prefix -> "named" or "numbered" (children of an nn.Sequential) of every ResNet,
              without its classifier
    others    all other names: module -> its names
"""

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
import yaml
from torch import nn

FILE = Path(__file__).with_name("weight_layouts.yaml")
SOURCES = {
    "moco-v3": "facebookresearch/moco-v3@c349e6e",
    "simsiam": "facebookresearch/simsiam@a7bc177",
    "dino": "facebookresearch/dino@7c446df",
    "barlowtwins": "facebookresearch/barlowtwins@8e8d284",
    "vicreg": "facebookresearch/vicreg@4e12602",
    "swav": "facebookresearch/swav@06b1b7c",
    "pixpro": "zdaxie/PixPro@e390d6b",
    "resim": "Tete-Xiao/ReSim@b6a36ee",
    "byol": "lucidrains/byol-pytorch@2993126",
    "sthalles": "sthalles/PyTorch-BYOL@f007ed6",
    "lightly": "lightly-ai/lightly@e8d317fc",
    "bolts": "Lightning-Universe/lightning-bolts@34958a889",
    "densecl": "WXinlong/DenseCL@b64bbb6",
}
STOOD_IN = {
    "aenum", "apex", "av", "beartype", "hydra", "lib", "lightly_utils", "lightning_utilities",
    "mmcv", "omegaconf", "pandas", "pydantic", "pytorch_lightning", "submitit",
    "torchmetrics", "pl_bolts", "accelerate", "openselfsup.version", "torchvision.models.utils",
}  # fmt: skip


# -- importing what needs more than there is -------------------------------------------------------


class Module(nn.Module):
    """In place of Lightning's."""

    def save_hyperparameters(self, *names, **options):
        pass


class Anything(types.ModuleType):
    """Stands in for a module, and for all that is imported from it; a base class is `Module`."""

    __path__ = ()

    def __init__(self, name: str = "anything"):
        super().__init__(name)

    def __getattr__(self, name: str):
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *arguments, **options):
        decorated = len(arguments) == 1 and not options and callable(arguments[0])
        return arguments[0] if decorated else self

    def __mro_entries__(self, bases):
        return (Module,)


class Standing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `Anything` for every package of these names."""

    def __init__(self, packages: Iterable[str]):
        self.packages = set(packages)

    def find_spec(self, name, path=None, target=None):
        if name in self.packages or name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


def module_of(folder: Path, name: str):
    """A module of a checkout; those of an earlier one of the same name are forgotten."""
    top = name.partition(".")[0]
    for known in [known for known in sys.modules if known.partition(".")[0] == top]:
        del sys.modules[known]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def class_of(path: Path, name: str, **known) -> type:
    """A class of a script, without running the rest of the script."""
    tree = ast.parse(path.read_text())
    wanted = (ast.Import, ast.ImportFrom)
    body = [n for n in tree.body if isinstance(n, wanted) or getattr(n, "name", "") == name]
    scope = {"__name__": path.stem} | known
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    scope.update(known)  # in place of what the script imports under these names
    return scope[name]


# -- checkpoints ----------------------------------------------------------------------------------


def flags(**values) -> argparse.Namespace:
    return argparse.Namespace(**values)


def resnet50(**options) -> nn.Module:
    return torchvision.models.resnet50(**options)


def distributed(module: nn.Module) -> list[str]:
    """Its names under DistributedDataParallel."""
    return [f"module.{name}" for name in module.state_dict()]


def moco_v3(folder: Path):
    builder = module_of(folder, "moco.builder")
    return distributed(builder.MoCo_ResNet(lambda **o: resnet50(**o), 256, 4096))


def simsiam(folder: Path):
    return distributed(module_of(folder, "simsiam.builder").SimSiam(resnet50))


def dino(folder: Path):
    head = module_of(folder, "vision_transformer").DINOHead(2048, 16)
    return list(module_of(folder, "utils").MultiCropWrapper(resnet50(), head).state_dict())


def barlow_twins(folder: Path):
    main = module_of(folder, "main")
    return distributed(main.BarlowTwins(flags(projector="8192-8192-8192", batch_size=2048)))


def vicreg(folder: Path):
    module_of(folder, "resnet")
    main = module_of(folder, "main_vicreg")
    return distributed(main.VICReg(flags(arch="resnet50", mlp="8192-8192-8192", batch_size=2048)))


def swav(folder: Path):
    network = module_of(folder, "src.resnet50").resnet50(
        normalize=True, hidden_mlp=2048, output_dim=128, nmb_prototypes=[3000, 3000, 3000]
    )
    return distributed(network)


def pixpro(folder: Path):
    models = module_of(folder, "contrast.models.PixPro")
    resnet = importlib.import_module("contrast.resnet")
    options = flags(
        feature_dim=256, head_type="early_return", pixpro_p=2, pixpro_momentum=0.99,
        pixpro_pos_ratio=0.7, pixpro_clamp_value=0.0, pixpro_transform_layer=1,
        pixpro_ins_loss_weight=0.0, num_instances=1024, batch_size=8, epochs=1, start_epoch=1,
    )  # fmt: skip
    return distributed(models.PixPro(resnet.resnet50, options))


def resim(folder: Path):
    builder = module_of(folder, "moco.builder")
    models = importlib.import_module("moco.models")
    return distributed(builder.MoCo(models.resnet50, K=16))


def byol_pytorch(folder: Path):
    byol = module_of(folder, "byol_pytorch.byol_pytorch")
    with torch.device("cpu"):
        return list(byol.BYOL(resnet50(), 32, hidden_layer="avgpool").state_dict())


def pytorch_byol(folder: Path):
    models = module_of(folder, "models.resnet_base_network")
    head = {"mlp_hidden_size": 512, "projection_size": 128}
    return list(models.ResNet18(name="resnet50", projection_head=head).state_dict())


RESNET50, SIZES = "benchmarks/imagenet/resnet50", {"batch_size_per_device": 4, "num_classes": 8}


def lightly(script: str, name: str, **options) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        module_of(folder, "lightly.models.modules.heads")
        sys.path.insert(0, str(folder))
        try:
            return list(class_of(folder / script, name)(**options).state_dict())
        finally:
            sys.path.remove(str(folder))

    return build


def openselfsup(folder: Path, kind: str, neck: str) -> list[str]:
    module_of(folder, "openselfsup.models")
    norm = {"type": "BN"}
    config = {
        "type": kind,
        "backbone": {"type": "ResNet", "depth": 50, "out_indices": [4], "norm_cfg": norm},
        "neck": {"type": neck, "in_channels": 2048, "hid_channels": 2048, "out_channels": 128},
        "head": {"type": "ContrastiveHead", "temperature": 0.2},
        "queue_len": 16,
    }
    builder = importlib.import_module("openselfsup.models.builder")
    return list(builder.build_model(config).state_dict())


def densecl(folder: Path):
    return openselfsup(folder, "DenseCL", "DenseCLNeck")


def openselfsup_moco(folder: Path):
    return openselfsup(folder, "MOCO", "NonLinearNeckV1")


BOLTS = "src/pl_bolts/models/self_supervised"


def bolts_moco(folder: Path):
    path = folder / BOLTS / "moco/moco_module.py"
    known = {"LRScheduler": object, "torchvision": torchvision}
    known["RepresentationQueue"] = class_of(path, "RepresentationQueue")
    return list(class_of(path, "MoCo", **known)(num_negatives=16).state_dict())


def bolts_byol(folder: Path):
    models = folder / BOLTS / "byol/models.py"
    known = {"MLP": class_of(models, "MLP"), "BYOLMAWeightUpdate": flags}
    known["SiameseArm"] = class_of(models, "SiameseArm", **known)
    byol = class_of(folder / BOLTS / "byol/byol_module.py", "BYOL", **known)
    return list(byol(base_encoder=resnet50()).state_dict())


def bolts_simclr(folder: Path):
    path = folder / BOLTS / "simclr/simclr_module.py"
    simclr = class_of(path, "SimCLR", Projection=class_of(path, "Projection"))
    module = simclr(gpus=1, num_samples=8, batch_size=8, dataset="imagenet", arch="resnet50")
    module.encoder = resnet50()  # what `init_model` makes, by a function that is stood in for
    return list(module.state_dict())


BUILT = {  # checkpoint: (checkout, what builds its names)
    "MoCo v3": ("moco-v3", moco_v3),
    "SimSiam": ("simsiam", simsiam),
    "DINO": ("dino", dino),
    "Barlow Twins": ("barlowtwins", barlow_twins),
    "VICReg": ("vicreg", vicreg),
    "SwAV": ("swav", swav),
    "PixPro": ("pixpro", pixpro),
    "ReSim": ("resim", resim),
    "DenseCL": ("densecl", densecl),
    "OpenSelfSup MoCo": ("densecl", openselfsup_moco),
    "Bolts MoCo": ("bolts", bolts_moco),
    "Bolts BYOL": ("bolts", bolts_byol),
    "Bolts SimCLR": ("bolts", bolts_simclr),
    "byol-pytorch": ("byol", byol_pytorch),
    "PyTorch-BYOL": ("sthalles", pytorch_byol),
    "lightly MoCo": ("lightly", lightly("examples/pytorch_lightning/moco.py", "MoCo")),
    "lightly BYOL": ("lightly", lightly("examples/pytorch_lightning/byol.py", "BYOL")),
    "lightly SimSiam": ("lightly", lightly("examples/pytorch_lightning/simsiam.py", "SimSiam")),
    "lightly SwaV": ("lightly", lightly("examples/pytorch_lightning/swav.py", "SwaV")),
    "lightly DINO": ("lightly", lightly("examples/pytorch_lightning/dino.py", "DINO")),
    "lightly DenseCL": ("lightly", lightly("examples/pytorch_lightning/densecl.py", "DenseCL")),
    "lightly benchmark MoCoV2": ("lightly", lightly(f"{RESNET50}/mocov2.py", "MoCoV2", **SIZES)),
    "lightly benchmark BYOL": ("lightly", lightly(f"{RESNET50}/byol.py", "BYOL", **SIZES)),
    "lightly benchmark DINO": ("lightly", lightly(f"{RESNET50}/dino.py", "DINO", **SIZES)),
}


# -- the file -------------------------------------------------------------------------------------


def resnet_names() -> list[tuple[str, list[str]]]:
    """Of a ResNet-50 without its classifier: named, and numbered as children of an nn.Sequential;
    and of a ResNet-18, by which some examples begin."""
    with torch.device("meta"):
        networks = [torchvision.models.get_model(arch) for arch in ("resnet50", "resnet18")]
    kinds = []
    for network in networks:
        children = list(network.children())
        network.fc = nn.Identity()
        named, numbered = network, nn.Sequential(*children[:-1])
        kinds += [("named", list(named.state_dict())), ("numbered", list(numbered.state_dict()))]
    return kinds


def described(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """(prefix -> kind of every ResNet in the names, the other names)."""
    left, resnets = dict.fromkeys(names), {}
    for kind, wanted in resnet_names():
        ends = [name.removesuffix(wanted[0]) for name in left if name.endswith(wanted[0])]
        for prefix in ends:
            if all(prefix + name in left for name in wanted):
                resnets[prefix] = kind
                for name in wanted:
                    del left[prefix + name]
    return resnets, list(left)


def grouped(names: list[str]) -> dict[str, str]:
    """Module -> the last parts of its names; "" for names without a module."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, last = name.rpartition(".")
        modules.setdefault(module, []).append(last)
    return {module: " ".join(lasts) for module, lasts in modules.items()}


def main() -> None:
    sys.meta_path.append(Standing(STOOD_IN))
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    content = yaml.safe_load(FILE.read_text())
    for name, (folder, build) in BUILT.items():
        with torch.device("meta"):
            resnets, others = described(build(Path(sys.argv[1], folder)))
        known = content["layouts"][name]
        known["resnets"] = dict(sorted(resnets.items(), key=lambda item: item[0] != known["taken"]))
        known["others"] = grouped(others)
    head = "# See record_weight_layouts.py.\n"
    FILE.write_text(head + yaml.safe_dump(content, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
