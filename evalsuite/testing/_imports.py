"""What importing a plugin does: every command of the suite pays for it, whether it uses the plugin or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

from evalsuite.hooks import EXTRAS
from evalsuite.testing._faults import Faults

__all__ = ["LIMIT", "check_import"]

LIMIT = 1.0  # seconds of processor time of its own

# Runs in a fresh interpreter. Audit events tell of the network whichever library asks for it; time is that of the
# processor, which a busy machine does not stretch, and each package is charged for its own modules only.
_PROBE = textwrap.dedent(
    """
    import collections, importlib, importlib.machinery, io, json, os, sys, time

    network, spent, stack, importers = [], collections.Counter(), [], {}
    out, sys.stdout = sys.stdout, io.StringIO()

    def audit(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            address = repr(arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0])
            if address[:1] == "(" or event.startswith("socket.get"):
                network.append(address)
                raise OSError("no network while a plugin is imported")

    def timed(self, module, run=importlib.machinery.SourceFileLoader.exec_module):
        package = module.__name__.partition(".")[0]
        importers.setdefault(package, stack[-1][0] if stack else "")
        stack.append([package, 0.0])
        began = time.process_time()
        try:
            run(self, module)
        finally:
            took, inner = time.process_time() - began, stack.pop()[1]
            spent[package] += took - inner
            if stack:
                stack[-1][1] += took

    sys.addaudithook(audit)
    importlib.machinery.SourceFileLoader.exec_module = timed
    error = None
    try:
        importlib.import_module(sys.argv[1])
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    torch = sys.modules.get("torch")
    print(json.dumps({
        "error": error, "network": network, "printed": sys.stdout.getvalue()[:200],
        "own": spent[(own := sys.argv[1].partition(".")[0])], "torch": torch is not None,
        "imports": sorted(package for package, by in importers.items() if by == own),
        "cuda": bool(torch and torch.cuda.is_initialized()),
        "changed": bool(torch and (torch.get_default_dtype() != torch.float32 or not torch.is_grad_enabled())),
    }), file=out, flush=True)
    os._exit(0)  # a thread that the import left behind must not keep us waiting
    """
)


def check_import(module: str, *, timeout: float = 300.0) -> dict[str, float | bool]:
    """Import a plugin's module in a fresh interpreter without a network, and see what that does.

    It may load torch, but not the packages that come with extras; it may work for a second at most; it may not ask
    for the network, print, start CUDA, or change torch's defaults. Returns seconds of its own (``own``) and whether
    it loads torch (``torch``). Raises AssertionError with a line for each fault.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
    faults = Faults()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, module], capture_output=True, text=True, env=environment, timeout=timeout,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AssertionError(f"importing {module} takes more than {timeout:.0f} s") from None
    if not faults.unless(done.returncode == 0 and bool(done.stdout), f"importing {module} ends the interpreter"):
        faults.settle()
    report = json.loads(done.stdout)
    for address in dict.fromkeys(report["network"]):
        faults.unless(False, f"importing {module} asks the network for {address}")
    if not report["network"]:
        faults.unless(report["error"] is None, f"importing {module} raises {report['error']}")
    faults.unless(
        report["own"] <= LIMIT,
        f"importing {module} works for {report['own']:.1f} s: do it where it is used, every command imports plugins",
    )
    for heavy in sorted(EXTRAS.keys() & set(report["imports"])):
        faults.unless(False, f"importing {module} loads {heavy}: import it in the function that uses it")
    faults.unless(not report["printed"], f"importing {module} prints {report['printed']!r}, which breaks --json")
    faults.unless(not report["cuda"], f"importing {module} starts CUDA, which breaks worker processes")
    faults.unless(not report["changed"], f"importing {module} changes torch's default type or gradient mode")
    faults.settle()
    return {"own": report["own"], "torch": report["torch"]}
