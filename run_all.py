"""Run the sweeps: ``python run_all.py --help``."""

if __name__ == "__main__":
    # Imported here, so that the processes of the cells, which import this file, import nothing more.
    from ablations.cli.run_all import main

    raise SystemExit(main())
