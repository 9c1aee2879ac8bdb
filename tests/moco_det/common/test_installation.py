from pathlib import Path

import pytest
from paths import REPOSITORY

import moco_det
from moco_det.common.errors import UserError
from moco_det.common.installation import own_file, yaml_path
from moco_det.config.loading import get_cfg, load_config


def test_a_checkouts_files_are_its_own():
    for name in ("configs", "tools/train_net.py", "pretrain/main.py"):
        assert own_file(name) == REPOSITORY / name


def test_a_yaml_of_the_project_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = str(REPOSITORY / "configs/pretrain/moco_v2_r50.yaml")
    assert yaml_path("configs/pretrain/moco_v2_r50.yaml") == ours
    assert yaml_path("pretrain/moco_v2_r50.yaml") == ours


def test_the_users_own_yaml_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/voc_R50_C4_24k_moco.yaml"
    Path("configs").mkdir()
    Path(name).symlink_to("nowhere")  # told of as it is, rather than replaced
    assert yaml_path(name) == name


@pytest.mark.parametrize(
    "name", ["absent.yaml", "configs/README.md", "configs", "../configs/x.yaml"]
)
def test_other_names_stay_what_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert yaml_path(name) == name


def test_configs_by_name_as_in_detectron2s_model_zoo():
    path = moco_det.get_config_file("voc_R50_C4_24k_moco.yaml")
    cfg = moco_det.get_cfg()
    assert cfg == get_cfg()
    cfg.merge_from_file(path)
    assert cfg == load_config(str(REPOSITORY / "configs/voc_R50_C4_24k_moco.yaml"))


def test_an_unknown_config_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="'voc_R50_C4_24k_mocco.yaml'.*'voc_R50_C4_24k_moco.yaml'"):
        moco_det.get_config_file("voc_R50_C4_24k_mocco.yaml")
