"""Entry point of ``python -m adderkit`` and ``accelerate launch -m adderkit``."""

from adderkit.cli import main

if __name__ == "__main__":
    main()
