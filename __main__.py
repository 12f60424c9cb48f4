"""``python -m adderkit``, and the module that ``accelerate launch -m adderkit`` starts."""

from adderkit.cli import main

if __name__ == "__main__":
    main()
