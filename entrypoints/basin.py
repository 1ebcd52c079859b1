"""The loss landscape around the three states of a healing run."""

from entrypoints._cli import command

main = command("basin")

if __name__ == "__main__":
    main()
