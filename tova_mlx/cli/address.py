"""Where a server listens."""

import socket
from ipaddress import ip_address

import click

from ..errors import OptionError


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at; warn of one that others reach.

    Raises OptionError.
    """
    try:
        # The first one, as mlx-lm's server does.
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"--host {host} --port {port}: cannot listen there ({error}). Try another "
            "--port, or leave --host out."
        ) from error
    if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        click.echo(
            f"Warning: --host {host} lets other machines in, and this server has no "
            "passwords, no encryption and no limit on requests, and loads any model "
            "that a request names. Put a proxy that has them in front of it, or leave "
            "--host out.",
            err=True,
        )
