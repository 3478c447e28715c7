"""``python -m openrlhf.cli.eval_gopo``: installed into OpenRLHF by openrlhf-gopo, which holds the code."""

from openrlhf_gopo.cli.eval_gopo import main

if __name__ == "__main__":
    main()
