"""Attack a healthy model and store the collapsed checkpoint."""

from entrypoints._cli import command

main = command("attack")

if __name__ == "__main__":
    main()
