"""python -m service: settings, bundles, socket, then serve until told to stop; says in one line why it cannot."""

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
    import structlog

    from service.app import create_app
    from service.logs import configure_logs
    from service.runtime import Runtime
    from service.server import Server, bind

    configure_logs(settings.log_level)
    app = create_app(settings)
    with bind(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        structlog.get_logger().info("listening", host=host, port=port)
        Server(app).run([listener])
    runtime: Runtime = app.state.runtime
    if runtime.failure is not None:
        raise runtime.failure


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
