"""Makes torchvision importable beside a torch of another build: python torchvision_operators.py SITE_PACKAGES.

The torchvision of PyPI is built for CUDA. Beside a torch for CPUs its compiled operators do not load, and its import
ends where it describes two of them to the compiler. Declaring those two, without code behind them, is enough for image
processors, which resize and normalise with torch alone.
"""

import pathlib
import sys

LOADS_OPERATORS = "from . import extension"
MARK = "# declared by tests/vllm_server"
DECLARATIONS = f"""
if not extension._has_ops():  {MARK}
    import torch

    _declared = torch.library.Library("torchvision", "DEF")  # a name, or it would be collected with what it declares
    for _operator in ("nms", "qnms"):
        _declared.define(_operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def declare(site_packages: pathlib.Path) -> None:
    """Adds the declarations behind the line that loads the operators, once."""
    path = site_packages / "torchvision" / "__init__.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if any(MARK in line for line in lines):
        return
    places = [i for i, line in enumerate(lines) if line.startswith(LOADS_OPERATORS)]
    if len(places) != 1:
        raise SystemExit(f"{path} has {len(places)} lines that begin with {LOADS_OPERATORS!r}, and must have one")
    lines.insert(places[0] + 1, DECLARATIONS)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    declare(pathlib.Path(sys.argv[1]))
