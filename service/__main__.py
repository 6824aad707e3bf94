"""python -m service: settings, port, processes, until told to stop; says in one line why it cannot."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from service.errors import StartError

if TYPE_CHECKING:
    from service.settings import Settings


def main() -> int:
    """Run the service; the answer is the process's exit status."""
    # As a container's first process it would not be ended by a SIGTERM that comes during the imports and the loading.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    from service.settings import describe_settings, load_settings

    argparse.ArgumentParser(
        prog="python -m service",
        description="Serve the bundles in REFRAIN_MODELS_DIR over HTTP.",
        epilog="settings, from the environment:\n" + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        serve(load_settings())
    except StartError as error:
        for line in str(error).splitlines():
            print(f"refrain: {line}", file=sys.stderr)
        return 1
    return 0


def serve(settings: Settings) -> None:
    """Serve until a signal; raises StartError when that cannot be, also when the models fail to load."""
    import asyncio

    from service.logs import configure_logs
    from service.metrics import shared_metrics
    from service.sockets import reserve
    from service.supervisor import Supervisor

    configure_logs(settings.log_level)
    with reserve(settings.host, settings.port) as port, shared_metrics("supervisor") as directory:
        asyncio.run(Supervisor(settings, port.getsockname()[1], directory).run())


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
