"""The first cell of the notebooks: what it sees, installs and refuses on machines that are described here."""

import importlib.util
import os
import re
import subprocess
import sys
import types
import venv
import zipfile
from pathlib import Path

import pytest

from jaxft.errors import DataError

ROOT = Path(__file__).parents[1]
GIT = "https://example.org/jaxft"
# What Colab had in August 2026, as far as it concerns JAX: the plugin is in every runtime, libtpu in those with a TPU.
COLAB = {"numpy": "2.1.3", "jax": "0.7.2", "jaxlib": "0.7.2", "jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"}
TPU_REQUIRES = ['libtpu==0.0.50.*; extra == "tpu"']


def load() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("colab", ROOT / "notebooks" / "colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The helper, as on a machine that is neither Colab nor Kaggle."""
    module = load()
    monkeypatch.setattr(module, "COLAB", False)
    monkeypatch.setattr(module, "KAGGLE", False)
    return module


class Pip:
    """Applies commands of pip to a list of packages; the newest jax is 0.12.1, with libtpu 0.0.50.2."""

    def __init__(self, packages: dict[str, str]) -> None:
        self.packages = dict(packages)

    def run(self, command: list[str]) -> None:
        verb, *what = command
        if verb == "uninstall":
            for name in what[1:]:
                del self.packages[name]
            return
        (line,) = what
        name, extra = re.match(r"(\w+)(?:\[(\w+)\])?", line).groups()
        version = line.partition("==")[2] or "0.12.1"
        if name == "jaxft":
            self.packages["jaxft"] = "0.1.0"
            kept = self.packages.get("jax", "0").startswith(("0.10.", "0.11.", "0.12."))
            version = self.packages["jax"] if kept else "0.12.1"
        self.packages |= {"jax": version, "jaxlib": version}
        if extra in ("cuda", "cuda12"):
            self.packages |= {"jax-cuda12-plugin": version, "jax-cuda12-pjrt": version}
        if extra == "tpu":
            self.packages["libtpu"] = "0.0.50.2"


def commands(colab: types.ModuleType, pip: Pip, accelerator: str | None) -> list[list[str]]:
    done: list[list[str]] = []
    while command := colab.next_command(pip.packages, TPU_REQUIRES, accelerator, GIT):
        assert command not in done
        done.append(command)
        pip.run(command)
    return done


@pytest.mark.parametrize("accelerator", [None, "gpu", "tpu"])
@pytest.mark.parametrize(
    "before",
    [
        COLAB,
        COLAB | {"libtpu": "0.0.21"},
        COLAB | {"jax-cuda13-plugin": "0.7.2", "jax-cuda13-pjrt": "0.7.2"},
        {"numpy": "2.3.0"},
        {"jax": "0.12.0", "jaxlib": "0.12.0"},
        COLAB | {"jaxft": "0.1.0", "jax": "0.12.1", "jaxlib": "0.12.1"},  # jaxft was installed without an extra
        COLAB | {"jaxft": "from a folder", "jax": "0.12.1", "jaxlib": "0.12.1", "libtpu": "0.0.21"},
    ],
)
def test_afterwards_jax_can_use_what_is_here(
    colab: types.ModuleType, before: dict[str, str], accelerator: str | None
) -> None:
    pip = Pip(before)
    assert commands(colab, pip, accelerator)
    plugins = {name: version for name, version in pip.packages.items() if re.match(r"jax-cuda", name)}
    assert "jaxft" in pip.packages
    # JAX does not use a plugin of another version than jaxlib's.
    assert set(plugins.values()) <= {pip.packages["jaxlib"]}
    assert accelerator != "gpu" or "jax-cuda12-plugin" in plugins
    assert accelerator != "tpu" or pip.packages["libtpu"].startswith("0.0.50.")
    assert not commands(colab, pip, accelerator), "after a restart nothing is left to do"


def test_a_later_build_of_a_plugin_is_left_alone(colab: types.ModuleType) -> None:
    packages = {"jaxft": "0.1.0", "jax": "0.12.1", "jaxlib": "0.12.1", "jax-cuda12-plugin": "0.12.1.post1"}
    assert colab.next_command(packages, [], "gpu", GIT) is None
    assert colab.next_command(packages | {"jax-cuda12-plugin": "0.12.0"}, [], "gpu", GIT)[0] == "uninstall"


@pytest.mark.parametrize(
    ("repository", "extra", "line"),
    [
        ("jaxft==0.1.0", "cuda", "jaxft[cuda]==0.1.0"),
        (GIT, "tpu", f"jaxft[tpu] @ git+{GIT}"),
        (f"git+{GIT}@v0.1.0", "", f"jaxft @ git+{GIT}@v0.1.0"),
        ("/kaggle/input/jaxft", "cuda", "/kaggle/input/jaxft[cuda]"),
    ],
)
def test_a_release_an_address_and_a_folder_can_be_named(
    colab: types.ModuleType, repository: str, extra: str, line: str
) -> None:
    assert colab.requirement(repository, extra) == line


def test_another_release_is_installed_over_the_old_one(colab: types.ModuleType) -> None:
    packages = {"jaxft": "0.0.9", "jax": "0.12.1", "jaxlib": "0.12.1"}
    assert colab.next_command(packages, [], None, "jaxft==0.1.0") == ["install", "jaxft==0.1.0"]
    assert colab.next_command(packages | {"jaxft": "0.1.0"}, [], None, "jaxft==0.1.0") is None


@pytest.mark.parametrize("host", ["COLAB", "KAGGLE", None])
def test_without_an_address_nothing_is_installed(
    colab: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if host:
        monkeypatch.setattr(colab, host, True)
    monkeypatch.setattr(colab, "is_importable", lambda module: module != "jaxft")
    monkeypatch.setattr(colab, "installed_packages", lambda: (COLAB, []))
    monkeypatch.setattr(colab, "run_pip", lambda *command: pytest.fail("pip ran"))
    with pytest.raises(colab.Stop, match="names no repository yet. Set it to the git address"):
        colab.set_up("https://github.com/OWNER/jaxft")
    monkeypatch.setattr(colab, "working_folder", lambda drive: pytest.fail("Drive was mounted"))
    with pytest.raises(colab.Stop, match="names no repository yet"):
        colab.set_up("https://github.com/OWNER/jaxft", drive=True)


def test_kaggle_is_not_taken_for_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kaggle's images are built on those of Colab, and have its variable."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert load().COLAB and not load().KAGGLE
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert load().KAGGLE and not load().COLAB


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("script", "devices", "accelerator"),
    [
        ("echo 'GPU 0: Tesla T4 (UUID: GPU-1)'; echo 'GPU 1: Tesla T4 (UUID: GPU-2)'", [], "gpu"),
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", [], None),
        ("exit 9", ["/dev/accel0"], "tpu"),
        ("exit 9", ["/dev/vfio/0", "/dev/vfio/vfio"], "tpu"),
        ("exit 9", ["/dev/vfio/vfio"], None),
    ],
)
def test_the_machine_is_asked_and_not_jax(
    colab: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, devices: list[str],
    accelerator: str | None,
) -> None:  # fmt: skip
    fake_nvidia_smi(tmp_path, script, monkeypatch)
    match = colab.glob.fnmatch.fnmatch
    monkeypatch.setattr(colab.glob, "glob", lambda pattern: [name for name in devices if match(name, pattern)])
    assert colab.find_accelerator() == accelerator


def test_another_version_in_memory_asks_for_a_restart(colab: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    colab.check_imported({"numpy": numpy.__version__})
    with pytest.raises(colab.Stop, match=r"numpy \S+ is loaded, 3.0.0 is installed. Restart the session"):
        colab.check_imported({"numpy": "3.0.0"})
    monkeypatch.setitem(sys.modules, "ml_dtypes", types.SimpleNamespace(__version__="0.1"))
    with pytest.raises(colab.Stop, match=r"ml_dtypes 0.1 is loaded, 0.5 is installed"):
        colab.check_imported({"ml-dtypes": "0.5"})


def test_a_gpu_that_jax_does_not_use_stops_the_notebook(
    colab: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert colab.check_platform(None)[0].platform == "cpu"
    with pytest.raises(colab.Stop, match=r"the gpu of this machine is not used: .* on the cpu.*jax\[cuda12\]=="):
        colab.check_platform("gpu")
    # Whoever asks for the CPU gets it.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert colab.check_platform("gpu")[0].platform == "cpu"


def test_a_small_model_sees_one_device_of_several(colab: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(colab, "install", lambda *what: None)
    monkeypatch.chdir(ROOT)
    colab.set_up(GIT, all_devices=True)
    assert not os.environ.keys() & set(names)
    colab.set_up(GIT)
    assert [os.environ[name] for name in names] == ["0", "0", "1,1,1", "1,1,1"]
    # Whoever has chosen some keeps them.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    colab.set_up(GIT)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(("host", "folder"), [("COLAB", "/content/jaxft-notebooks"), ("KAGGLE", "/kaggle/working")])
def test_the_folder_is_the_same_after_every_restart(
    colab: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert colab.working_folder(drive=False) == tmp_path
    monkeypatch.setattr(colab, host, True)
    assert colab.working_folder(drive=False) == Path(folder)
    monkeypatch.chdir("/")
    assert colab.working_folder(drive=False) == Path(folder)
    monkeypatch.chdir(ROOT / "notebooks")
    assert colab.working_folder(drive=False) == ROOT


def test_drive_is_mounted_on_request_alone(colab: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(colab.Stop, match="DRIVE is for Colab. Set it to False"):
        colab.working_folder(drive=True)
    mounted: list[str] = []
    google = types.ModuleType("google.colab")
    google.drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", google)
    monkeypatch.setattr(colab, "COLAB", True)
    colab.working_folder(drive=False)
    assert not mounted
    assert colab.working_folder(drive=True) == Path("/content/drive/MyDrive/jaxft-notebooks")
    assert mounted == ["/content/drive"]


def test_a_checkout_installs_nothing_and_says_what_to_run(
    colab: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(colab, "is_importable", lambda module: module != "jaxft")
    monkeypatch.setattr(colab, "install", lambda *what: pytest.fail("pip ran"))
    with pytest.raises(colab.Stop, match=rf"installs nothing. .*-m pip install --editable {ROOT}"):
        colab.set_up(GIT)


def test_a_folder_named_like_the_package_is_not_the_package(
    colab: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jaxft_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not colab.is_importable("jaxft_of_nobody") and colab.is_importable("numpy")


@pytest.mark.parametrize("host", ["COLAB", "KAGGLE"])
def test_the_token_comes_from_the_secrets_and_is_not_shown(
    colab: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    secrets: dict[str, str] = {}
    google, kaggle = types.ModuleType("google.colab"), types.ModuleType("kaggle_secrets")
    google.userdata = types.SimpleNamespace(get=lambda name: secrets[name])
    kaggle.UserSecretsClient = lambda: types.SimpleNamespace(get_secret=lambda name: secrets[name])
    monkeypatch.setitem(sys.modules, "google.colab", google)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    monkeypatch.setattr(colab, host, True)
    monkeypatch.setenv("HF_TOKEN", "")
    colab.get_token()
    assert "no HF_TOKEN (KeyError" in capsys.readouterr().out and not os.environ["HF_TOKEN"]
    secrets["HF_TOKEN"] = "hf_secret"
    colab.get_token()
    assert os.environ["HF_TOKEN"] == "hf_secret"
    output = capsys.readouterr()
    assert "hf_secret" not in output.out + output.err


def test_a_refusal_is_shown_without_a_traceback(colab: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    shells = pytest.importorskip("IPython.core.interactiveshell")
    shell = shells.InteractiveShell()
    shell.user_ns |= {"Stop": colab.Stop, "DataError": DataError}
    for error, shown in (("Stop", "Stopped: do this"), ("DataError", "DataError: do this")):
        done = shell.run_cell(f"raise {error}('do this')")
        output = capsys.readouterr()
        assert not done.success and shown in output.out + output.err
        assert "Traceback" not in output.out + output.err


# A jax that uses a GPU as the real one does: by a plugin of exactly jaxlib's version.
FAKE_JAX = """
import importlib.metadata as metadata, types
__version__ = metadata.version("jax")
def devices():
    try:
        uses = metadata.version("jax-cuda12-plugin") == metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        uses = False
    return [types.SimpleNamespace(platform="gpu" if uses else "cpu", device_kind="fake")]
"""


def write_wheel(folder: Path, name: str, version: str, *requires: str, source: str | None = None) -> None:
    label = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    extras = {match[1] for line in requires if (match := re.search(r'extra == "(\w+)"', line))}
    metadata += "".join(f"Provides-Extra: {extra}\n" for extra in sorted(extras))
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        f"{label}.dist-info/METADATA": metadata,
        f"{label}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    } | ({} if source is None else {f"{name}/__init__.py": source})
    record = "".join(f"{path},,\n" for path in files) + f"{label}.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{label}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{label}.dist-info/RECORD": record}).items():
            wheel.writestr(path, text)


def write_jax(folder: Path, version: str) -> None:
    write_wheel(folder, "jaxlib", version)
    write_wheel(folder, "jax-cuda12-plugin", version)
    extras = [f'jax-cuda12-plugin=={version}; extra == "cuda12"', f'libtpu==0.0.{version[2:]}.*; extra == "tpu"']
    write_wheel(folder, "jax", version, f"jaxlib=={version}", *extras, source=FAKE_JAX)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_the_cell_with_the_real_pip_over_what_colab_has(tmp_path: Path, machine: str) -> None:
    """pip, the environment and the cell are real; the packages are empty ones of these names and versions."""
    wheels, folder, bin_folder = tmp_path / "wheels", tmp_path / "empty", tmp_path / "bin"
    for one in (wheels, folder, bin_folder):
        one.mkdir()
    write_jax(wheels, "0.7.2")
    write_jax(wheels, "0.12.1")
    extras = ['jax[cuda12]; extra == "cuda"', 'jax[tpu]; extra == "tpu"']
    write_wheel(wheels, "jaxft", "0.1.0", "jax>=0.10", *extras, source="")
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    if machine == "gpu":
        (bin_folder / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Tesla T4'\n", encoding="utf-8")
        (bin_folder / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PYTHONPATH"))}
    environment |= {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "COLAB_RELEASE_TAG": "release-colab",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }  # fmt: skip
    colab_packages = [f"{name}==0.7.2" for name in ("jax", "jaxlib", "jax-cuda12-plugin")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *colab_packages], env=environment, check=True)

    source = (ROOT / "notebooks" / "colab.py").read_text(encoding="utf-8")
    before_use = "import jax\n" if machine == "gpu" else ""

    def run(prefix: str = "") -> subprocess.CompletedProcess[str]:
        call = f'\nset_up("jaxft==0.1.0", root=Path({str(folder)!r}))\n'
        return subprocess.run(
            [python, "-c", prefix + source + call],
            env=environment, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip

    first = run(before_use)
    if before_use:
        assert "jax 0.7.2 is loaded, 0.12.1 is installed. Restart the session" in first.stderr
        first = run()
        assert "pip" not in first.stdout
    else:
        assert "pip install jaxft==0.1.0" in first.stdout and "pip uninstall --yes jax-cuda12-plugin" in first.stdout
    assert f"working in {folder}, on 1 x fake ({machine})" in first.stdout, first.stderr
    again = run()
    assert "pip" not in again.stdout and f"({machine})" in again.stdout, again.stderr
