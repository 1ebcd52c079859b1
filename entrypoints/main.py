"""The whole experiment: models x arms x seeds, attacked, healed and summarized."""

from entrypoints._cli import command

main = command("main")

if __name__ == "__main__":
    main()
