"""`python -m tova_mlx` is `tova-mlx`."""

import signal


def run() -> None:
    """Run the command line; Ctrl-C while it is imported ends the process quietly."""
    handler = signal.getsignal(signal.SIGINT)
    # One that is ignored stays so.
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    signal.signal(signal.SIGINT, handler)
    main(prog_name="tova-mlx")


if __name__ == "__main__":
    run()
