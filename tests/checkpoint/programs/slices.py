"""One of several processes: loads a model onto a mesh and writes it out again; prints what it read and gathered.

Arguments: the model's folder, a folder for what this process writes, port, number of processes, own number, and the
mesh as JSON.
"""

import json
import sys

from jaxft.checkpoint import hf
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.config import MeshConfig
from jaxft.files.paths import LocalFolder
from jaxft.sharding import arrays, distributed, make_mesh_plan

folder, out, port, processes, index = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
distributed.start(f"127.0.0.1:{port}", processes, index)
mesh = make_mesh_plan(MeshConfig(**json.loads(sys.argv[6])))

read: list[int] = []  # bytes of each call
gathered: list[int] = []
plain_read, plain_gathered = LocalFolder.read, arrays._gather_block


def counted_read(self, name, ranges):
    if name.endswith(".safetensors"):
        read.append(sum(length for _, length in ranges))
    return plain_read(self, name, ranges)


def counted_gathered(*args):
    block = plain_gathered(*args)
    gathered.append(block.nbytes)
    return block


LocalFolder.read, arrays._gather_block = counted_read, counted_gathered
SafetensorsFolder(folder)
headers = sum(read)
read.clear()
model = load_model(folder, mesh=mesh).module
weights = sum(read) - headers
files = hf.write_weights(model, out)
print(json.dumps({"weights": weights, "gathered": sum(gathered), "largest": max(gathered), "files": files}), flush=True)
