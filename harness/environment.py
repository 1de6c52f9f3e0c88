"""What a child process sees of the environment: what it needs, by name. A secret is never on the list."""

from __future__ import annotations

import os

_NAMES = (
    "PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH",
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "CC", "CXX",
)  # fmt: skip
_PREFIXES = ("LC_", "XDG_", "HARNESS_", "CUDA_", "NVIDIA_", "TRITON_", "TORCHINDUCTOR_")
_NETWORK_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_NETWORK_PREFIXES = ("HF_", "HUGGING_FACE_", "PIP_", "SSL_")


def allowed() -> dict[str, str]:
    """For code that somebody else wrote: methods. No tokens, no way to the network."""
    return {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}


def allowed_with_network() -> dict[str, str]:
    """For our own code that fetches models and data: also proxies, certificates, and the hub's own variables."""
    return allowed() | {
        name: value for name, value in os.environ.items()
        if name.upper() in _NETWORK_NAMES or name.startswith(_NETWORK_PREFIXES)
    }  # fmt: skip
