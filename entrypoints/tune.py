"""Search the strongest healer of a model."""

from entrypoints._cli import command

main = command("tune")

if __name__ == "__main__":
    main()
