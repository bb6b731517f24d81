"""Eight fake CPU devices, one thread, no network; and tiny models as transformers writes them."""

import os
import tempfile
from importlib.metadata import version

# Before JAX is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
given = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in given:
    given = f"{given} --xla_force_host_platform_device_count=8".strip()
quick = ""
if version("jaxlib").startswith("0.10."):  # XLA ends a process that names a flag it does not know
    # Of the time that a test takes, most is compilation, and of that nearly half goes into these.
    quick = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = given + quick
for name, value in {
    "OMP_NUM_THREADS": "1",
    # Threads of XLA's CPU client: a fake device waits in a collective on one of them, and with only as many as
    # there are devices two collectives at once can wait for each other until XLA aborts.
    "NPROC": "64",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAXFT_CACHE": os.path.join(tempfile.gettempdir(), f"jaxft-tests-{os.getuid()}"),
}.items():
    os.environ.setdefault(name, value)

import ctypes  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# The flags are read once, here. Of what comes later, libtpu and programs that tests start, not all know them.
jax.devices()
os.environ["XLA_FLAGS"] = given

# Compiling costs more than running at these sizes. Programs that tests start are compiled as users' are.
jax.config.update("jax_disable_most_optimizations", True)
# No two tests compile the same program; programs that tests start do, and keep what they compile in JAXFT_CACHE.
jax.config.update("jax_enable_compilation_cache", False)
# Tracing makes many objects that live long; looking through them all the time is a sixteenth of the suite's.
gc.set_threshold(100_000, 50, 50)

# Tests whose like run in `make test`, so that these are left to `make test-all`.
DOUBLES = Path(__file__).with_name("doubles.txt")
MOST_RESIDENT = 3 * 2**30  # bytes of one process, of which two share a small machine


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests in doubles.txt as slow. Whole runs come first: else the last of them keeps one worker waiting for
    the other for minutes.
    """
    doubles = set(DOUBLES.read_text(encoding="utf-8").split("\n")) - {""}
    items_of = {item.nodeid.split("/", 1)[-1]: item for item in items}
    for name in doubles & items_of.keys():
        items_of[name].add_marker(pytest.mark.slow)
    collected = {name.partition("::")[0] for name in items_of}
    chosen_by_name = any("::" in argument for argument in config.args)
    unknown = [name for name in doubles - items_of.keys() if name.partition("::")[0] in collected]
    if unknown and not chosen_by_name:
        raise pytest.UsageError(f"{DOUBLES.name} names tests that do not exist: {', '.join(sorted(unknown))}")
    runs = Path(__file__).parent / "runs"
    items.sort(key=lambda item: not item.path.is_relative_to(runs))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Programs compiled for the tests of a file go with it once they have become many."""
    yield
    if sys.platform == "linux" and int(Path("/proc/self/statm").read_text().split()[1]) * 4096 > MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """tiny_llama(variant) -> a float32 folder that LlamaForCausalLM.save_pretrained wrote; see VARIANTS."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def make(variant: str = "plain") -> str:
        config = transformers.LlamaConfig(**TINY | VARIANTS[variant])
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # Wider than the usual start, norms and biases included, so that every parameter shows in the logits.
            for name, parameter in model.named_parameters():
                spread = 0.1 if parameter.ndim == 1 else 0.2
                parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
        folder = str(tmp_path_factory.mktemp(variant))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def torch_llama() -> Callable[..., Any]:
    """torch_llama(folder) -> a fresh float32 model of transformers with plain attention."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def load(folder: str) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return load


@pytest.fixture(scope="session")
def smoke_config() -> dict[str, Any]:
    """config.json of the tiny tied model that ships with jaxft, for tests that need no oracle."""
    from jaxft.assets import ASSETS

    return json.loads((ASSETS / "smoke" / "config.json").read_text(encoding="utf-8"))
