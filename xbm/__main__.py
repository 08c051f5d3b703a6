"""`python -m xbm` and the command `xbm`."""

import sys


def main() -> None:
    """Run the command line, or exit with the name of the missing package."""
    try:
        from xbm.experiments.cli import main as command
    except ModuleNotFoundError as error:
        sys.exit(
            f"The command line needs more packages than the library ({error.name} is missing): pip install xbm[demo]"
        )
    command(prog_name="xbm")


if __name__ == "__main__":
    main()
