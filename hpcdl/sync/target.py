"""Which wandb server is meant, and whether it answers. hpcdl's own process imports no wandb."""

from __future__ import annotations

import configparser
import http.client
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path

PUBLIC = "https://api.wandb.ai"
OF_A_RUN = (
    "MODE",
    "DISABLED",
    "RUN_ID",
    "RESUME",
    "NAME",
    "NOTES",
    "TAGS",
    "RUN_GROUP",
    "JOB_TYPE",
    "DIR",
    "SWEEP_ID",
    "PROJECT",
    "SERVICE",
)
"""WANDB_… variables that say something of one run: of another than ours."""


def base_url() -> str:
    """The server that `wandb` itself would take: $WANDB_BASE_URL, its settings file, wandb's own."""
    named = os.environ.get("WANDB_BASE_URL")
    if not named:
        folder = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(Path(folder) / "settings", encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            settings.clear()
        named = settings.get("default", "base_url", fallback=None)
    return (named or PUBLIC).rstrip("/")


def environment(server: str) -> dict[str, str]:
    """What the sender's process gets: this one's environment, less what would make another run of ours."""
    others = {f"WANDB_{name}" for name in OF_A_RUN}
    return {
        **{key: value for key, value in os.environ.items() if key not in others},
        "WANDB_BASE_URL": server,
    }


def unreached(server: str, limit_s: float) -> str:
    """Why a server doesn't answer; empty where it does, with whatever code.

    Args:
        server: its address.
        limit_s: how long it may take.
    """
    try:
        request = urllib.request.Request(f"{server}/graphql", method="GET")
        with urllib.request.urlopen(request, timeout=limit_s):
            return ""
    except urllib.error.HTTPError:
        return ""
    except urllib.error.URLError as error:
        # wandb's own process looks at certificates with other means than Python: not ours to judge.
        return "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    except ValueError as error:
        return f"no address of a server ({error})"
