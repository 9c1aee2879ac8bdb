"""What a user sees of errors, and how a command ends."""

import errno
import re
import sys

import pytest
import torch

from moco_det.common.errors import (
    DISTRIBUTIONS,
    EXTRAS,
    UserError,
    exit_cleanly,
    explained,
    import_optional,
    is_lost_peer,
)


def test_a_user_error_is_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise UserError("no file at a.json: name another")
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "error: no file at a.json: name another\n")


def test_a_line_is_written_at_once(monkeypatch):
    """Two processes of a launch wrote "error: ...error: ..." where Python does not buffer."""
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    with pytest.raises(SystemExit), exit_cleanly():
        raise UserError("no such file")
    assert written == ["error: no such file\n"]


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_other_errors_and_exit_codes_pass_through():
    with pytest.raises(ZeroDivisionError), exit_cleanly():
        print(1 / 0)
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        sys.exit(75)
    assert ended.value.code == 75


def test_a_user_error_can_be_caught_by_a_library():
    """It is no SystemExit, which `except Exception` would let through."""
    assert issubclass(UserError, Exception)


def test_an_optional_package_that_is_there():
    assert import_optional("json.decoder", "a test", "json") is sys.modules["json.decoder"]


def test_an_optional_package_that_is_absent():
    message = (
        r"^a test needs the package no-such: pip install no-such \(No module named 'no_such'\)$"
    )
    with pytest.raises(UserError, match=message) as raised:
        import_optional("no_such", "a test", "no-such")
    assert isinstance(raised.value.__cause__, ImportError)


def test_a_damaged_package_is_named_with_what_it_raises(tmp_path, monkeypatch):
    (tmp_path / "damaged.py").write_text("raise AttributeError('of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"install damaged \(as it is, it cannot be imported: AttributeError: of another vers"
    with pytest.raises(UserError, match=message):
        import_optional("damaged", "a test", "damaged")


def test_a_missing_package_of_an_extra_names_it(monkeypatch):
    for module in ("sklearn", "sklearn.svm"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, module, None)
    message = (
        r"^the SVM needs the package scikit-learn: pip install scikit-learn, or pip install -e "
        r"'\.\[evaluation\]' in the folder of moco_det \("
    )
    with pytest.raises(UserError, match=message):
        import_optional("sklearn.svm", "the SVM", "scikit-learn")


def test_a_missing_package_is_no_bug(monkeypatch):
    for module, words in (
        ("safetensors.torch", "safetensors, or pip install -e '.[hub]' in the folder of moco_det"),
        ("torch.nn", "-e . in the folder of moco_det"),
    ):
        package = module.split(".")[0]
        monkeypatch.setitem(sys.modules, package, None)
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert explained(error) == f"the package {package} is not installed: pip install {words}"
    for name in ("moco_det.no_such", "json.no_such", None):
        assert explained(ModuleNotFoundError("No module", name=name)) is None


def test_extras_are_those_of_the_installation(repository):
    setup = (repository / "setup.py").read_text()
    for module, extra in EXTRAS.items():
        package = DISTRIBUTIONS.get(module, module)
        (listed,) = re.findall(rf'^        "{extra}": (\[.*\]|[A-Z]+),', setup, re.M)
        if not listed.startswith("["):
            (listed,) = re.findall(rf"^{listed} = (.*)", setup, re.M)
        assert re.search(rf'"{package}\b', listed, re.I), (module, extra)


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which is made on CUDA only."""


GPU_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.00 GiB of "
    "which 1.00 GiB is free. See documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError(GPU_FULL), "Tried to allocate 2.00 GiB: lower the batch (--batch-size"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "error: out of memory: lo"),
        (MemoryError(), "the machine's memory is too small"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "(pid 7) was"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "pass fewer --work"),
        (RuntimeError("EADDRINUSE: the server socket"), "port of --dist-url is in use"),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer [::1]:1"), "another process of th"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pth"), "cannot write a.pth: No space"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 9999), "cannot use the path aaa"),
    ],
)  # fmt: skip
def test_errors_of_other_packages_that_a_user_can_understand(error, words, capsys):
    with pytest.raises(SystemExit) as ended, exit_cleanly():
        raise error
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_other_errors_are_not_explained_away():
    for error in (RuntimeError("size mismatch"), FileNotFoundError(2, "No such file", "a")):
        assert explained(error) is None
    assert not is_lost_peer(RuntimeError("Connection closed by peer"))  # of a download


def test_a_real_failure_to_allocate_is_explained():
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(2**60)
    assert "the machine's memory is too small" in explained(raised.value)
