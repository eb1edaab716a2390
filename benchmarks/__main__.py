"""Ratios against the released design's shape, whole logits, and plain PyTorch: see benchmarks/README.md.

    python -m benchmarks [--only NAME ...] [--json FILE] [--readme FILE]

Exits 1 when a gate fails.
"""

import argparse
import json
import pathlib
import sys

from benchmarks import compiled, decode, delta_rule, demo, engines, heads, padding, teachers, torch_step, trl
from benchmarks.report import write_readme

ALL = {
    "teachers": teachers.teachers,
    "teachers_wall": teachers.teachers_wall,
    "kl": heads.kl,
    "kl_memory": heads.kl_memory,
    "topk": heads.topk,
    "decode": decode.decode,
    "delta_rule": delta_rule.delta_rule,
    "delta_rule_backward": delta_rule.delta_rule_backward,
    "delta_rule_memory": delta_rule.delta_rule_memory,
    "step": teachers.step,
    "torch": torch_step.torch,
    "padding": padding.padding,
    "demo": demo.demo,
    "engines": engines.engines,
    **compiled.GATES,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--json", type=pathlib.Path, help="file for the results, a list")
    parser.add_argument("--readme", type=pathlib.Path, help="file whose tables are made anew")
    args = parser.parse_args()
    results = []
    for name in args.only:
        results.append(ALL[name]())
        print(results[-1].line(), flush=True)
        if args.json:  # after each: a run that is cut off keeps what it has
            args.json.write_text(json.dumps([r.json() for r in results], indent=2) + "\n")
    if args.only == list(ALL):
        print(trl.note())
    if args.readme:
        write_readme(args.readme, results)
    return 0 if all(r.holds for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
