"""Heal collapsed checkpoints on clean text."""

from entrypoints._cli import command

main = command("heal")

if __name__ == "__main__":
    main()
