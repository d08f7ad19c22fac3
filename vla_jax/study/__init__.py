"""What pretraining is worth on the tabletop world, measured: a few minutes of CPU, one command, raw lines kept."""
