"""The commands, a file each; `cli` joins those of `itarflow`, the scripts in vae/ start the others."""
