"""GET /health, and /v1/jaxft/system: what the server and its machine are doing."""

import asyncio
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxft.serving.endpoints.table import Endpoint
from jaxft.serving.service import Service, service_of
from jaxft.serving.storage.jobs import UNFINISHED, jobs_in

ANY_KEY: tuple[str, ...] = ()


async def health(request: Request) -> Response:
    """Whether the server starts, works or ends: 200 while it takes requests, else 503."""
    service = service_of(request)
    healthy = service.phase == "warm" and service.supervisor.is_alive
    return JSONResponse({"status": service.phase}, 200 if healthy else 503)


async def system(request: Request) -> Response:
    """Versions, models, queue, memory and disk."""
    return JSONResponse(await asyncio.to_thread(_system, service_of(request)))


def _system(service: Service) -> dict[str, Any]:
    rows, disk = jobs_in(service.state, *UNFINISHED), shutil.disk_usage(service.state.folder)
    return {
        "object": "jaxft.system",
        "versions": {"jaxft": version("jaxft"), "jax": version("jax"), "python": platform.python_version()},
        "status": service.phase,
        "started_at": service.started_at,
        "uptime_seconds": round(time.time() - service.started_at),
        "models": list(service.settings.models),
        "devices": service.supervisor.devices,
        "jobs": [{"id": row["id"], "status": row["status"], "phase": row["phase"]} for row in rows],
        "engines": service.engines.shown(),
        "memory": _memory(),
        "server_bytes": _resident_bytes(),
        "load": list(os.getloadavg()),
        "cpus": os.cpu_count(),
        "disk": {"total": disk.total, "free": disk.free},
        "price_per_hour": service.settings.price_per_hour,
    }


def _memory() -> dict[str, int]:
    """Bytes of this machine's memory, in all and available; empty where the kernel does not tell."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return {}
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    names = {"total": "MemTotal", "available": "MemAvailable"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items() if key in lines}


def _resident_bytes() -> int:
    """Memory of this process; 0 where the kernel does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0


ENDPOINTS = (Endpoint("GET", "/jaxft/system", system, ANY_KEY),)
