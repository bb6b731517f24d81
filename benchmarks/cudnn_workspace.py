"""Memory in which cuDNN's attention works on a GPU that need not be there, by form: backward, bfloat16.

    pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12
    python benchmarks/cudnn_workspace.py [--card=h100] [--rows=2] [--length=4096] [--heads=32] [--kv_heads=8]

XLA asks cuDNN for this memory when it compiles on a GPU. Without one it cannot, and leaves it out. The graphs are those
that XLA builds for the calls of `jaxft/nn/attention/kernels/cudnn.py`, and for cuDNN's packed form, in which documents
are offsets into the rows and which needs a Hopper. cuDNN loads NVIDIA's driver library, libcuda.so.1, but uses no
device.
"""

import argparse
import json
from typing import Any

MIB = 2**20
H100 = {
    "deviceVer": 900, "multiProcessorCount": 132, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "regsPerBlock": 65536,
    "totalGlobalMem": 84942979072, "smClockRateKHz": 1980000, "l2CacheSize": 52428800, "memClockRateKHz": 2619000,
    "maxBlockSize": [1024, 1024, 64], "maxGridSize": [2147483647, 65535, 65535], "supportCoopLaunch": 1,
    "memoryBusWidth": 5120, "pciDeviceId": 0, "isTccDriver": 0, "cudaDeviceId": 0, "driverVer": 12080,
    "deviceName": "NVIDIA H100 80GB HBM3",
}  # fmt: skip
A100 = H100 | {
    "deviceVer": 800, "multiProcessorCount": 108, "maxSharedMemoryPerBlockOptin": 166912, "smClockRateKHz": 1410000,
    "l2CacheSize": 41943040, "deviceName": "NVIDIA A100-SXM4-80GB",
}  # fmt: skip
CARDS = {"h100": H100, "a100": A100}


class Graph:
    """A graph of the backward attention of `rows` x `length` keys, of which each row has `documents` places.

    The queries are one of the `parts` of a row, as on a context axis. total: whether cuDNN is told how many tokens
    there are, which XLA does not tell it.
    """

    def __init__(self, shape: argparse.Namespace, *, documents: int = 1, total: bool = False) -> None:
        import cudnn

        self.cudnn, self.shape, self.documents, self.total = cudnn, shape, documents, total
        self.batch, self.queries = shape.rows * documents, shape.length // shape.parts
        self.graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            device_property=cudnn.create_device_properties(json.dumps(CARDS[shape.card])),
            sm_version=CARDS[shape.card]["deviceVer"] // 10,
        )
        self.offsets = {}
        if documents > 1:
            self.offsets = {heads: self._integers(self.batch + 1) for heads in {shape.heads, shape.kv_heads}}

    def workspace(self, *, bias: bool, gradient: bool) -> int:
        """Bytes in which the backward kernel works. bias: with a mask; gradient: whose gradient is computed too."""
        shape, data_type = self.shape, self.cudnn.data_type
        options: dict[str, Any] = {"attn_scale": shape.head_dim**-0.5, "use_causal_mask": shape.parts == 1}
        if bias:
            options["bias"] = self._mask()
        if gradient:
            options["dBias"] = self._mask()
        if self.offsets:
            options |= {"use_padding_mask": True, "seq_len_q": self._integers(self.batch)}
            options["seq_len_kv"] = self._integers(self.batch)
        if self.total:
            options |= dict.fromkeys(("max_total_seq_len_q", "max_total_seq_len_kv"), shape.rows * shape.length)
        sums = self.graph.tensor(
            dim=[self.batch, shape.heads, self.queries, 1],
            stride=[shape.heads * self.queries, self.queries, 1, 1],
            data_type=data_type.FLOAT,
        )
        sizes = [(shape.heads, self.queries), (shape.kv_heads, shape.length), (shape.kv_heads, shape.length)]
        q, k, v, out, grad = (self._rows(*size) for size in [*sizes, sizes[0], sizes[0]])
        gradients = self.graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=grad, stats=sums, **options)
        for tensor, size in zip(gradients, sizes, strict=True):
            dims, strides = self._layout(*size)
            tensor.set_output(True).set_dim(dims).set_stride(strides)
            if self.offsets:
                tensor.set_ragged_offset(self.offsets[size[0]])
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        return self.graph.get_workspace_size()

    def _layout(self, heads: int, length: int) -> tuple[list[int], list[int]]:
        head_dim = self.shape.head_dim
        return [self.batch, heads, length, head_dim], [length * heads * head_dim, head_dim, heads * head_dim, 1]

    def _rows(self, heads: int, length: int) -> Any:
        dims, strides = self._layout(heads, length)
        tensor = self.graph.tensor(dim=dims, stride=strides, data_type=self.cudnn.data_type.BFLOAT16)
        if self.offsets:
            tensor.set_ragged_offset(self.offsets[heads])
        return tensor

    def _mask(self) -> Any:
        dims = [self.shape.rows, 1, self.queries, self.shape.length]
        strides = [dims[2] * dims[3], dims[2] * dims[3], dims[3], 1]
        return self.graph.tensor(dim=dims, stride=strides, data_type=self.cudnn.data_type.BFLOAT16)

    def _integers(self, count: int) -> Any:
        return self.graph.tensor(dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=self.cudnn.data_type.INT32)


def main() -> None:
    """Prints a row of the table for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=tuple(CARDS), default="h100")
    for name, default in (
        ("rows", 2),
        ("length", 4096),
        ("heads", 32),
        ("kv_heads", 8),
        ("head_dim", 128),
        ("parts", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--documents", default="16", help="places of a row in the packed form, with commas")
    shape = parser.parse_args()
    heads = f"{shape.heads} heads of {shape.head_dim}, {shape.kv_heads} of keys"
    print(f"| {shape.rows} x {shape.length} tokens, {heads} | MiB |")
    print("|---|---|")
    forms = [("a mask and its gradient", 1, False, True, True), ("a mask", 1, False, True, False)]
    for documents in map(int, filter(None, shape.documents.split(","))):
        forms.append((f"{documents} documents a row", documents, False, False, False))
        forms.append((f"{documents} documents a row, told how many tokens there are", documents, True, False, False))
    for name, documents, total, bias, gradient in forms:
        size = Graph(shape, documents=documents, total=total).workspace(bias=bias, gradient=gradient)
        print(f"| {name} | {size / MIB:,.1f} |", flush=True)


if __name__ == "__main__":
    main()
