"""``python -m openrlhf.cli.train_gopo_offline``: installed into OpenRLHF by openrlhf-gopo, which holds the code."""

from openrlhf_gopo.cli.train_gopo_offline import main

if __name__ == "__main__":
    main()
