r"""The span finder on 100,000 random completions (about a minute): invariants, and an oracle that works on text.

PYTHONPATH=.:tests python tests/stress/fuzz_spans.py [COUNT] [SEED]
"""

import sys
import tempfile
import time

from fuzz import fuzz_spans
from helpers import make_processor_folder

from vigos_jax.data.processor import Processor

if __name__ == "__main__":
    count, seed = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 100_000), (2, 1)))
    with tempfile.TemporaryDirectory() as folder:
        start, counts = time.monotonic(), fuzz_spans(Processor.load(make_processor_folder(folder)), count, seed=seed)
    print(f"{counts['completions']} completions, {counts['valid']} valid, 0 failures, {time.monotonic() - start:.0f} s")
