"""Loads a large random checkpoint, writes it again, and prints how much anonymous memory that took. For a subprocess.

    python tests/memory_probe.py MODEL_FOLDER OUTPUT_FOLDER FSDP [KIND]

Prints one JSON object, in bytes: `load` and `save`, the most memory above what the parameters held at that moment;
`shard`, the largest shard of a leaf; `leaf`, the largest leaf; `tensor`, the largest tensor of the files. With KIND
the kernels are quantised and nothing is written: `load`, `held` and `leaf`.
"""

import json
import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp

from configs import base
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import tensor_table
from vigos_jax.models.quantization import quantised_shapes
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.runtime.sharding import make_mesh, tree_shardings
from vigos_jax.weights import reading, writing
from vigos_jax.weights.safetensors_file import byte_count


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what RssAnon is")


class Peak:
    """The most memory above the start and above `resident`, sampled by a thread while the context lasts."""

    def __enter__(self) -> "Peak":
        self.resident, self.excess, self._done = 0, 0, False
        self._start = anonymous()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done:
            # Parameters count from when their copy to the device begins: on a CPU its memory is this memory.
            resident = self.resident
            self.excess = max(self.excess, anonymous() - self._start - resident)
            time.sleep(0.001)

    def __exit__(self, *exc: object) -> None:
        self._done = True
        self._thread.join()


def main(folder: pathlib.Path, output: pathlib.Path, fsdp: int, kind: str = "none") -> None:
    config = ModelConfig.load(folder)
    abstract = {"params": quantised_shapes(abstract_variables(VisionLanguageModel(config))["params"], kind)}
    shardings = tree_shardings(abstract, make_mesh(data=1, fsdp=fsdp, tensor=1), base.get_config().mesh.rules)
    real = jax.device_put

    with Peak() as load:

        def counted(x, *args, **kwargs):
            load.resident += x.nbytes
            return real(x, *args, **kwargs)

        jax.device_put = counted
        params = reading.load_params(
            folder, config, abstract["params"], dtype=jnp.bfloat16, shardings=shardings["params"]
        )
        jax.device_put = real
    held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
    assert load.resident == held, (load.resident, held)
    if kind != "none":
        print(json.dumps({"load": load.excess, "held": held, "leaf": max(x.nbytes for x in jax.tree.leaves(params))}))
        return
    tensors = list(writing.stream_tensors(params, tensor_table(config), config, dtype=jnp.bfloat16))
    with Peak() as save:
        writing.save_sharded(output, tensors, max_shard_bytes=500_000_000)
    leaves = jax.tree.leaves(params)
    print(
        json.dumps(
            {
                "load": load.excess,
                "save": save.excess,
                "held": held,
                "shard": max(s.data.nbytes for x in leaves for s in x.addressable_shards),
                "leaf": max(x.nbytes for x in leaves),
                "tensor": max(byte_count(x) for _, x in tensors),
            }
        )
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
