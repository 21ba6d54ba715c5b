"""Keeps the process of the page from connecting to other machines.

An audit hook refuses every connection, packet and name look-up to another machine, from any library, until
the process ends. Environment variables that configure Gradio are removed.
"""

import errno
import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

_WITH_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")  # socket, address
_WITH_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")  # host, ...


def stay_alone(folder: Path) -> None:
    """Block connections to other machines from now on. Call it before importing Gradio. folder: for Gradio's files."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_EXAMPLES_CACHE": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    sys.addaudithook(_refuse)


def is_this_machine(host: object) -> bool:
    """Whether a host is this machine's loopback, by name or address."""
    if isinstance(host, bytes | bytearray):
        host = host.decode(errors="replace")
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _WITH_ADDRESS:
        address = arguments[1]
        if not isinstance(address, tuple) or is_this_machine(address[0]):  # a socket of this machine has a path
            return
        host = address[0]
    elif event in _WITH_NAME:
        host = arguments[0]
        if is_this_machine(host):
            return
    else:
        return
    raise ConnectionRefusedError(errno.ECONNREFUSED, f"flowmask serve connects to no other machine, and refused {host}")
