"""The program: `mnist-cli`, or `python -m mnist_cli`."""

import os
import signal
import sys
import types


def program() -> int:
    """Run the command line of this process; its exit code, which no signal changes any more."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    from mnist_cli.cli import main
    from mnist_cli.imports import thaw
    from mnist_cli.signals import ignore_them

    code = main()
    ignore_them()
    thaw()
    return code


def _leave(number: int, frame: types.FrameType | None) -> None:
    """End the process, which has done nothing yet but import its first modules."""
    error = f"interrupted by {signal.Signals(number).name}"
    hint, code = "type the command again to start over", 128 + number
    if "--json" in sys.argv:  # nothing may be imported here
        document = f'{{"error": "{error}", "hint": "{hint}", "exit_code": {code}}}\n'
        os.write(1, document.encode())
    os.write(2, f"error: {error}\nhint: {hint}\n".encode())
    os._exit(code)


if __name__ == "__main__":
    sys.exit(program())
