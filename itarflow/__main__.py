"""`python -m itarflow`, which launchers of several processes start."""

from itarflow.cli import main

if __name__ == "__main__":
    main()
