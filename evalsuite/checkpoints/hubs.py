"""Where published weights come from, and an answer at once where there is no network to fetch them."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
import torchvision

from evalsuite.errors import BackboneError

__all__ = ["at_once", "reachable"]

WAIT = 2.0  # seconds for a hub to answer a first packet
PORTS = {"https": 443, "http": 80}
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@contextmanager
def at_once(scheme: str, name: str) -> Iterator[None]:
    """Within the block weights of ``timm:`` or ``torchvision:`` are fetched, or read from the cache of their library;
    without a network from the cache alone, where Hugging Face's library would keep checking for updates of them.

    Raises :class:`BackboneError` after ``WAIT`` seconds where the network is needed and not there.
    """
    weights = _published(scheme, name)
    if weights is None or (weights.cached and not weights.repository) or reachable(weights.url):
        yield
        return
    if not weights.cached:
        raise BackboneError(
            f"the weights of {scheme}:{name} cannot be fetched",
            cause=f"they are not on this machine, and {urlsplit(weights.url).hostname} does not answer",
            fix=f"connect to the network, or download {weights.url} elsewhere and give the file's path with --arch"
            f" {scheme}:{name}",
        )
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # which every request looks at
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def reachable(url: str) -> bool:
    """Whether the host of ``url`` (or the proxy that leads there) accepts a connection within ``WAIT`` seconds; looking
    its name up may take longer than that, and is not waited for."""
    proxies = urllib.request.getproxies()
    parts = urlsplit(url)
    if parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or ""):
        proxy = proxies[parts.scheme]
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}", "http")
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname, parts.port or PORTS[parts.scheme]), WAIT).close()
        except Exception:  # whatever is wrong with it, it is not reached
            return
        answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(WAIT)
    return answered.is_set()


class _Weights(NamedTuple):
    """Where weights are, whether that is a repository of Hugging Face's hub, and whether they are here already."""

    url: str
    repository: bool
    cached: bool


def _published(scheme: str, name: str) -> _Weights | None:
    """None where nothing is published by that name, which is refused when it is built."""
    try:
        if scheme == "torchvision":
            return _file(str(torchvision.models.get_model_weights(name)["DEFAULT"].url))
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except (ValueError, KeyError, RuntimeError):
        return None
    if config is None or not config.hf_hub_id:
        return _file(config.url) if config is not None and isinstance(config.url, str) else None
    repository, _, revision = config.hf_hub_id.partition("@")
    files = [config.hf_hub_filename] if config.hf_hub_filename else FILES
    cached = any(
        isinstance(huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None), str)
        for file in files
    )
    return _Weights(f"{huggingface_hub.constants.ENDPOINT}/{repository}", True, cached)


def _file(url: str) -> _Weights:
    name = os.path.basename(urlsplit(url).path)
    return _Weights(url, False, os.path.isfile(os.path.join(torch.hub.get_dir(), "checkpoints", name)))
