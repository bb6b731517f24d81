"""`python -m jaxft.serving.engine --socket=N`: the engine of one model, which a server starts and ends."""

import argparse
import sys

from jaxft.errors import ExitCode, JaxftError
from jaxft.serving.engine.channel import Channel


def main() -> ExitCode:
    """Answers until the server closes the connection, or is gone."""
    parser = argparse.ArgumentParser(prog="jaxft.serving.engine", description=__doc__)
    parser.add_argument("--socket", type=int, required=True)
    channel = Channel(parser.parse_args().socket)
    spec = channel.begin()
    channel.tell("phase", phase="loading")
    from jaxft.serving.engine.loading import load
    from jaxft.serving.engine.requests import Requests

    try:
        slots = load(spec, channel)
    except (JaxftError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        channel.tell("failed", message=str(error))
        return ExitCode.REFUSED
    requests = Requests(slots, channel.add)
    worked = False
    while True:
        for message in channel.take(wait=not worked):
            if message is None:
                return ExitCode.DONE
            requests.take(message)
        worked = requests.step()
        if not channel.flush():
            return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
