"""Where weights come from, and their arrays, read without running code that a file may hold.

    FILE                        of any layout in `moco_det.common.weight_layouts`
    https://HOST/NAME.pth       kept where torch.hub keeps its downloads; a hash in the name is
                                checked by torch.hub's rule: NAME-0123abcd.pth
    hf://ORGANISATION/REPOSITORY/FILE, or REPOSITORY@REVISION: of the Hugging Face Hub
    torchvision://resnet50      its first weights, IMAGENET1K_V1; or torchvision://NAME/WEIGHTS
    detectron2://PATH           of Detectron2's model zoo
    moco_v2_200ep               one of OFFICIAL: what the authors of MoCo published

Every command that takes weights takes all of these.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from moco_det.common.checkpoint_files import UnreadableFile, read_checkpoint
from moco_det.common.errors import UserError, one_line
from moco_det.common.files import replacing
from moco_det.common.official_weights import OFFICIAL
from moco_det.common.processes import print_on_main
from moco_det.common.weight_checks import FLOATS, checked_weights
from moco_det.common.weight_layouts import DETECTRON2, ENTRIES, NETWORK, find_backbone, name_map

MODEL_ZOO = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
WEB = ("http://", "https://")
HUB = "hf://"
TORCHVISION = "torchvision://"
SCHEMES = (*WEB, HUB, TORCHVISION, MODEL_ZOO[0])

# torch.hub's: the first digits of the SHA-256; not a date.
NAMED_HASH = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.")


# -- the arrays of a file -------------------------------------------------------------------------


def read_state_dict(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the arrays of a weight file without running any code it may hold.

    They are in one of `weight_layouts.ENTRIES`, or are the file.

    Args:
        source: see above.

    Returns:
        weights: name -> CPU tensor, finite and float32 but for counters. Caffe2's names of a ResNet
            become Detectron2's; other names are the file's own.
        metadata: the file's other entries; and NETWORK, where the file has several networks.

    Raises:
        UserError: no such file, an unsafe or a damaged one, no arrays in it, or an array that is no
            weight (see `moco_det.common.weight_checks`); it cannot be downloaded.
    """
    content = read_checkpoint(local_file(source))
    if not isinstance(content, Mapping):
        raise UnreadableFile(f"{source} holds a {type(content).__name__}, not a dict of arrays")
    arrays, metadata = _take_entry(content)
    # D1's optimizer state travels among its arrays.
    arrays = {k: v for k, v in arrays.items() if not str(k).endswith("_momentum")}
    odd = _unused_oddities(arrays)
    weights = checked_weights(source, {k: v for k, v in arrays.items() if k not in odd}) | odd
    if not weights:
        raise UnreadableFile(f"{source} holds no arrays")
    names = name_map("caffe2", "detectron2")
    if not names.keys().isdisjoint(weights):
        metadata["__author__"] = "Caffe2"  # Detectron2's mark of such a file
        weights = {names.get(name, name): value for name, value in weights.items()}
    return weights, metadata


def _take_entry(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    for entry, note in ENTRIES.items():
        arrays = content
        for key in entry:
            arrays = arrays.get(key) if isinstance(arrays, Mapping) else None
        if isinstance(arrays, Mapping):
            own = (entry[0], NETWORK)
            rest = {key: value for key, value in content.items() if key not in own}
            return arrays, rest | ({NETWORK: note} if note else {})
    return content, {}


def _unused_oddities(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays beside the backbone that are no weights, such as the labels of a queue."""
    odd = {
        name: value
        for name, value in arrays.items()
        if isinstance(value, Tensor) and value.dtype not in FLOATS and value.numel() != 1
    }
    if odd:
        with contextlib.suppress(UserError):
            backbone = find_backbone(map(str, arrays))
            if backbone.layout is not DETECTRON2:
                return {name: odd[name] for name in backbone.dropped if name in odd}
    return {}


# -- from a word to a file ------------------------------------------------------------------------


def is_remote(source: str | Path) -> bool:
    """Whether a word stands for a file that may have to be downloaded."""
    text = str(source)
    return not os.path.exists(text) and (text in OFFICIAL or text.startswith(SCHEMES))


def local_file(source: str | Path) -> Path:
    """The file itself, downloaded first, once, where `source` is no file of this machine.

    Of several processes on a machine one downloads and the others wait.

    Raises:
        UserError: there is no such file, it cannot be downloaded, or it is not the published one;
            the message says where to get it and where to put it.
    """
    text = str(source)
    if not is_remote(source):
        if not os.path.exists(text) or os.path.isdir(text):
            known = f"; addresses begin with {', '.join(SCHEMES)}" if "://" in text else ""
            raise UnreadableFile(f"no weight file at {text[:200]}{known}")
        return Path(text)
    if text in OFFICIAL:
        print_on_main(f"{text}: {OFFICIAL[text].describe()}")
    if text.startswith(HUB):
        return _from_hub(text)
    place = _place(text)
    if not place.path.is_file():
        _download(place, text)
    elif text in OFFICIAL:  # it may have been put there by hand
        _check_digest(place, place.path)
    return place.path


def kept_file(source: str | Path) -> Path | None:
    """`local_file` as far as that is there without a download; raises UserError as that does."""
    if not is_remote(source):
        return local_file(source)
    if str(source).startswith(HUB):
        hub, options = _hub_file(str(source))
        found = hub.try_to_load_from_cache(**options)
        return Path(found) if isinstance(found, str) else None
    path = _place(str(source)).path
    return path if path.is_file() else None


@dataclass(frozen=True)
class _Place:
    """An address, where its file is kept, and the hash that it must have, if that is known."""

    url: str
    path: Path
    algorithm: str = ""
    digest: str = ""  # the first digits


def _place(source: str) -> _Place:
    """Files without a hash in their name are told apart by their address: there is more than one
    `resnet50.pth`."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if source in OFFICIAL:
        url, md5, *_ = OFFICIAL[source]
        return _Place(url, folder / Path(url).name, "md5", md5)
    url = source.replace(*MODEL_ZOO) if source.startswith(MODEL_ZOO[0]) else source
    url = torchvision_url(source) if source.startswith(TORCHVISION) else url
    parts = urllib.parse.urlsplit(url)
    name = Path(urllib.parse.unquote(parts.path)).name
    if not parts.netloc or not name:
        raise UnreadableFile(f"{source} names no file: write https://HOST/PATH/FILE")
    found = NAMED_HASH.search(name)
    if found:
        return _Place(url, folder / name, "sha256", found[1])
    parents = [part for part in parts.path.split("/")[:-1] if part not in ("", ".", "..")]
    return _Place(url, folder.joinpath(parts.netloc.replace(":", "_"), *parents, name))


def torchvision_url(source: str) -> str:
    """Raises UserError for a network or weights that torchvision does not have."""
    name, _, which = source.removeprefix(TORCHVISION).partition("/")
    try:
        published = torchvision.models.get_model_weights(name)
        return published[which or "IMAGENET1K_V1"].url
    except (ValueError, KeyError) as error:
        known = "torchvision has no such network"
        if isinstance(error, KeyError):
            known = f"torchvision has {', '.join(published.__members__) or 'none for it'}"
        raise UserError(f"no weights at {source}: {known}") from error


def _download(place: _Place, source: str) -> None:
    url, path = place.url, place.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if path.is_file():  # another process has downloaded it meanwhile
                return
            print(f"downloading {url} to {path}", flush=True)
            with replacing(path) as temporary:
                torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
                _check_digest(place, temporary)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {source} ({one_line(error, 200)}): fetch {url} by other means and "
            f"put it at {path}, or name the local file"
        ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that all processes of this machine ask for, while open."""
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_digest(place: _Place, path: Path) -> None:
    if not place.digest:
        return
    with open(path, "rb") as file:
        digest = hashlib.new(place.algorithm, usedforsecurity=False)
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if not found.startswith(place.digest):
        fate = f"remove {path}" if path == place.path else "it was not kept"
        raise UserError(
            f"the file of {place.url} has the {place.algorithm.upper()} {found[:8]}..., not "
            f"{place.digest}: it is cut off or another one; {fate}, and download it again"
        )


# -- the Hugging Face Hub -------------------------------------------------------------------------


def _hub_file(source: str) -> tuple[Any, dict[str, str | None]]:
    """The library, and what it calls such a file."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} needs huggingface_hub: pip install 'moco_det[hub]', or fetch the file by "
            "other means and name it"
        ) from error
    organisation, _, rest = source.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not (organisation and repository and file):
        raise UserError(f"{source} names no file: write hf://ORGANISATION/REPOSITORY/FILE")
    options = {"repo_id": f"{organisation}/{repository}", "filename": file}
    return huggingface_hub, options | {"revision": revision or None}


def _from_hub(source: str) -> Path:
    hub, options = _hub_file(source)
    try:
        return Path(hub.hf_hub_download(**options))
    except Exception as error:  # whatever the network and its libraries raise
        url = hub.hf_hub_url(**options)
        raise UserError(
            f"cannot download {source} ({one_line(error, 200)}): fetch {url} by other means and "
            "name the local file"
        ) from error
