"""What must be equal on every processor: hashes of protocols, files of demo data, identities of fresh weights.

python tests/portable.py [--all]         prints them, of all demo data or of one set of each kind
python tests/portable.py --portable ...  computes as a processor without vector instructions would
python tests/portable.py --run ARGS      python ARGS, as such a processor would
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from evalsuite import hooks
from evalsuite.data import Source, source

WORLDS = ("folder", "coco", "voc-seg", "medmnist")
ARCHITECTURES = ("timm:test_resnet", "timm:test_vit", "small:resnet18", "objects:slate")


def portable() -> dict[str, str]:
    """Environment variables under which numpy, torch, oneDNN, MKL, OpenBLAS and the C library use no vectors."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    present = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    return {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",
        "NPY_DISABLE_CPU_FEATURES": ",".join(present),
    }


def digests(registry: hooks.Registry, everything: bool = False) -> dict[str, str]:
    """{what: digest}."""
    from evalsuite.checkpoints import load_backbone

    names = registry.names("task")
    found = {f"{n} {p.id}": p.hash for n in names for p in registry.get("task", n).protocols}
    found |= {a: load_backbone(f"random:{a}", registry).backbone.identity for a in ARCHITECTURES}
    for name in registry.names("dataset") if everything else WORLDS:
        layout = source(registry, name)
        if type(layout).demo is not Source.demo:
            found[f"demo {name}"] = _content(layout)
    return found


def _content(layout: Source) -> str:
    """sha256 over the names and bytes of a small demo world's files."""
    content = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        layout.demo(Path(folder), images=4)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content.update(f"{file.relative_to(folder)}\0".encode())
            content.update(file.read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    if "--run" in sys.argv[1:2]:
        os.execve(sys.executable, [sys.executable, *sys.argv[2:]], os.environ | portable())
    if "--portable" in sys.argv:
        arguments = [a for a in sys.argv[1:] if a != "--portable"]
        os.execve(sys.executable, [sys.executable, __file__, *arguments], os.environ | portable())
    here = hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry
    print(json.dumps(digests(here, "--all" in sys.argv), indent=1, sort_keys=True))
