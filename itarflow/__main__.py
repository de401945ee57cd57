"""`python -m itarflow` is `itarflow`, so that several processes can share it: `accelerate launch -m itarflow bpd`."""

from itarflow.commands.cli import main

if __name__ == "__main__":
    main()
