"""Prints the version of the first installed package among those named on the command line."""

import sys
from importlib.metadata import PackageNotFoundError, version


def main(names: list[str]) -> None:
    for name in names:
        try:
            sys.stdout.write(version(name))
        except PackageNotFoundError:
            continue
        return


if __name__ == "__main__":
    main(sys.argv[1:])
