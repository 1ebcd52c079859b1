"""Train an embedded model (nano, micro) from nothing."""

from entrypoints._cli import command

main = command("pretrain")

if __name__ == "__main__":
    main()
