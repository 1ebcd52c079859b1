"""Read the predecessor's recorded results into MLflow."""

from entrypoints._cli import command

main = command("import_results")

if __name__ == "__main__":
    main()
