"""Pool stored healing runs into recovery statistics."""

from entrypoints._cli import command

main = command("summarize")

if __name__ == "__main__":
    main()
