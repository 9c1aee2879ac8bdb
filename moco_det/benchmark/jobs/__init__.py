"""What is run: grids, reproductions, the quickstart, ablations, and the runner of all of them."""
