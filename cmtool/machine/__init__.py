"""The machine below a run: how its threads wait for one another."""
