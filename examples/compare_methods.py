"""Two methods on the same clients, over several seeds: python examples/compare_methods.py [ROUNDS]"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where perfedavg is

import pandas as pd

import perfedavg

METHODS = ("fedavg", "fedper")
SEEDS = (0, 1)
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def scores(method: str, seed: int) -> pd.DataFrame:
    """A row a client."""
    run = perfedavg.run(model="mlp", method=method, seed=seed, rounds=ROUNDS, fine_tune_method="none")
    print(f"{method}, seed {seed}: {run.result['seconds']:.1f} s, {run.folder}")
    return run.clients.assign(method=method, seed=seed)


if __name__ == "__main__":
    clients = pd.concat([scores(method, seed) for method in METHODS for seed in SEEDS])
    columns = ["initial_accuracy", "personalized_accuracy"]
    print(clients.groupby(["population", "method"])[columns].mean().round(4))

    # The same clients train and are scored under each method, so their differences can be taken one by one.
    by_client = clients.pivot(
        index=["population", "seed", "client_id"], columns="method", values="personalized_accuracy"
    )
    gain = by_client[METHODS[1]] - by_client[METHODS[0]]
    print(f"\n{METHODS[1]} over {METHODS[0]}, client by client:")
    print(gain.groupby("population").agg(["mean", "sem", "min", "max"]).round(4))
