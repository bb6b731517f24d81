"""Folders that other tools quantised: which form they have, by config.json, and their tensors as dense ones.

Which layers are quantised is told by the tensors that are there; lists of modules in config.json are not needed.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxft.checkpoint.quantized import bitsandbytes
from jaxft.checkpoint.quantized.float8 import find_float8
from jaxft.checkpoint.quantized.integers import find_awq, find_gptq, find_packed
from jaxft.checkpoint.quantized.matrices import Dequantized, QuantizedMatrix
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, ModelError, listed
from jaxft.files.json_fields import COUNT, FLAG, OBJECT, TEXT, FieldKind, check_kinds, listing, mapping

FIELDS = ("quantization_config", "compression_config", "quantization")
FLOAT8 = ("fp8", "mxfp8", "fbgemm_fp8")
READ = "FP8, MXFP8, GPTQ and AWQ in 4 bits, compressed-tensors in FP8 and packed 4 or 8 bits, bitsandbytes' NF4, MXFP4"
BLOCK = FieldKind(
    text="two numbers above zero, as a list or a text such as 128x128",
    fits=lambda value: isinstance(value, str) and re.fullmatch(r"[1-9]\d*[xX][1-9]\d*", value) is not None,
) | listing(COUNT, "a list")
KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(
        ("quant_method", "checkpoint_format", "quant_algo", "format", "version", "bnb_4bit_quant_type"), TEXT
    ),
    **dict.fromkeys(("bits", "w_bit"), COUNT),
    **dict.fromkeys(("zero_point", "load_in_4bit"), FLAG),
    "config_groups": mapping(OBJECT, "an object of objects"),
    "sparsity_config": OBJECT,
    "weight_block_size": BLOCK,
}
# What dense models are called from which quantised ones have their names.
SUFFIX = re.compile(
    r"[-_.](?:unsloth|bnb|fp8|mxfp8|nvfp4|fp4|w[48]a\d+|gptq|awq|hqq|torchao|int[48]|[248]-?bit|mlx|quantized|autoround"
    r"|exl[23]|eetq|quanto|aqlm|marlin|gemm|gemv|dynamic|static|g128|\dbpw).*$",
    re.IGNORECASE,
)
# Tensors that only quantised matrices have.
PARTS = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".W_q")


def quantization_of(hf_config: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The settings under which a folder says that it is quantised; None if it says nothing.

    Raises ModelError for a form that is not read. path: of the folder, whose name may be that of the dense model.
    """
    given = next((hf_config[name] for name in FIELDS if hf_config.get(name) is not None), None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ModelError(
            f"{path}: quantization_config={given!r} in config.json is not an object of settings. {_mend(path)}"
        )
    _check_kinds(given)
    problem = _problem(given)
    if problem is not None:
        raise ModelError(f"{path} is quantised: {problem}. {_mend(path)}")
    return dict(given)


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Raises ModelError for a setting of the wrong kind among those that are read."""
    where = "quantization_config of config.json"
    check_kinds(given, KINDS, where)
    for name, group in (given.get("config_groups") or {}).items():
        check_kinds(group, {"format": TEXT, "weights": OBJECT}, f"{name} in {where}")
        check_kinds(group.get("weights") or {}, {"type": TEXT, "block_structure": BLOCK}, f"{name} in {where}")
    check_kinds(given.get("sparsity_config") or {}, {"format": TEXT}, f"sparsity_config in {where}")


def without_quantization(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the dense model. What it says of MXFP4 stays: the family reads it."""
    given = hf_config.get("quantization_config")
    if isinstance(given, Mapping) and given.get("quant_method") == "mxfp4":
        return dict(hf_config)
    return {name: value for name, value in hf_config.items() if name not in FIELDS}


def dequantized(given: Mapping[str, Any] | None, source: TensorSource) -> tuple[TensorSource, list[str] | None]:
    """(the source with dense matrices, the names of those that the files keep dense too) by `quantization_of`.

    The names are None if nothing was quantised, or in bitsandbytes' NF4 and MXFP4, which have sources of their own.
    Raises CheckpointError if settings and tensors contradict each other.
    """
    specs = source.specs()
    if given is None:
        _refuse_parts(specs)
        return source, None
    method = given.get("quant_method")
    if method in ("bitsandbytes", "mxfp4"):
        return source, None
    matrices: dict[str, QuantizedMatrix]
    matrices, left_out = {}, frozenset[str]()
    if method == "gptq":
        matrices |= find_gptq(specs, added=0 if given.get("checkpoint_format") == "gptq_v2" else 1)
    elif method == "awq":
        matrices |= find_awq(specs)
    else:
        floats, left_out = find_float8(specs, _block(given))
        matrices |= floats
        matrices |= find_packed(source) if method == "compressed-tensors" else {}
    if not matrices:
        raise CheckpointError(
            f"config.json says that the weights are quantised ({method}), but no tensor is: remove its "
            "quantization_config if they are dense, or take the files that belong to it"
        )
    shown = Dequantized(source, matrices, left_out)
    dense = [name for name, spec in shown.specs().items() if name not in matrices and len(spec.shape) > 1]
    return shown, dense


def without_empty_biases(source: TensorSource, expected: Collection[str]) -> TensorSource:
    """The source without biases of zeros that the model does not have. expected: its tensors.

    Some writers of GPTQ and AWQ give every linear layer a bias.
    """
    extra = [name for name in source.specs() if name.endswith(".bias") and name not in expected]
    empty = frozenset(name for name in extra if not source.read(name).any())
    return Dequantized(source, {}, empty) if empty else source


def _problem(given: Mapping[str, Any]) -> str | None:
    """Why a form is not read; None if it is."""
    method = given.get("quant_method")
    if method == "bitsandbytes":
        return bitsandbytes.problem_of(given)
    if method in ("mxfp4", *FLOAT8):
        return None
    if method == "gptq":
        form = given.get("checkpoint_format") or "gptq"
        read = given.get("bits") == 4 and form in ("gptq", "gptq_v2")
        what = f"GPTQ with {given.get('bits')} bits in the form {form!r}"
        return None if read else f"{what} is not read, only 4 bits in gptq or gptq_v2"
    if method == "awq":
        bits, form = given.get("bits", given.get("w_bit")), str(given.get("version") or "gemm").lower()
        zeros = given.get("zero_point", True)
        what = f"AWQ with {bits} bits in the form {form!r}, zero_point={zeros},"
        return None if bits == 4 and form == "gemm" and zeros else f"{what} is not read, only 4 bits with zeros in gemm"
    if method == "compressed-tensors":
        return _problem_of_compressed(given)
    if method == "modelopt" and str(given.get("quant_algo", "")).upper() == "FP8":
        return None
    what = "MLX" if method is None and "group_size" in given else repr(method)
    return f"the form {what} (quantization_config={dict(given)!r}) is not read (read are {READ})"


def _problem_of_compressed(given: Mapping[str, Any]) -> str | None:
    groups = given.get("config_groups") or {}
    forms = {given.get("format"), *(group.get("format") for group in groups.values() if isinstance(group, Mapping))}
    unknown = forms - {None, "float-quantized", "pack-quantized", "naive-quantized", "mixed-precision"}
    if unknown:
        return f"compressed-tensors in the form {', '.join(sorted(map(repr, unknown)))} is not read"
    kinds = {((group or {}).get("weights") or {}).get("type") for group in groups.values()}
    if "int" in kinds and "pack-quantized" not in forms:
        return "compressed-tensors with whole numbers that are not packed is not read"
    sparse = (given.get("sparsity_config") or {}).get("format")
    if sparse not in (None, "dense"):
        return f"compressed-tensors with sparse weights ({sparse}) is not read"
    if given.get("transform_config"):
        return "compressed-tensors with transforms of the weights (transform_config) is not read"
    return None


def _block(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """The outputs and inputs of a block that share a scale, if the settings name one size for all."""
    sizes = [given.get("weight_block_size")]
    for group in (given.get("config_groups") or {}).values():
        sizes.append(((group or {}).get("weights") or {}).get("block_structure"))
    for block in sizes:
        if isinstance(block, str):
            block = block.lower().split("x")
        if isinstance(block, (list, tuple)) and len(block) == 2:
            return int(block[0]), int(block[1])
    return None


def _mend(path: str) -> str:
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    dense = SUFFIX.sub("", name)
    hint = f", probably called {dense}" if dense and dense != name else ""
    return (
        f"Take the model in its own precision{hint}, and quantise it while it is loaded: --quantization=nf4-dq, or "
        "model.quantization in a config"
    )


def _refuse_parts(specs: Mapping[str, TensorSpec]) -> None:
    parts = [name for name in specs if name.endswith(PARTS)]
    if parts:
        raise CheckpointError(
            f"{listed(parts, 3)} belong to quantised matrices, but config.json has no quantization_config, which says "
            "how they are to be read: take the config.json that belongs to these files"
        )
