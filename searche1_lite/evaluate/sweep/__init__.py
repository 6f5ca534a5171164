"""Ablation sweeps: `plan.py` reads what is asked for, `runs.py` does it, `compare.py` says what came out."""
