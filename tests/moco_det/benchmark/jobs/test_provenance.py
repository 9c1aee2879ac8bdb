from moco_det.benchmark.jobs import provenance


def test_it_names_code_packages_and_machine(repository):
    found = provenance.provenance(repository)
    assert set(found) == {"code", "packages", "hardware"}
    assert found["code"]["moco_det"] and found["code"]["commit"]
    assert {"python", "torch", "torchvision", "pycocotools"} <= set(found["packages"])
    assert "core" in found["hardware"]["processor"]
    assert provenance.environment(repository)["torch"] == found["packages"]["torch"]


def test_what_is_not_installed_is_left_out():
    assert provenance.version("no-such-package") is None


def test_a_folder_that_is_no_checkout_has_no_commit(repository):
    assert provenance.commit(repository / "tests" / "nowhere") == "unknown"
