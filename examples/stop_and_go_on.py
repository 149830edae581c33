"""A run that is stopped, goes on, and gives one client its model: python examples/stop_and_go_on.py [ROUNDS]"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where perfedavg is

import torch

import perfedavg

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
SETTINGS = {"dataset": "digits", "model": "mlp", "method": "fedrep", "rounds": ROUNDS}

if __name__ == "__main__":
    rounds = perfedavg.rounds(**SETTINGS)
    for record in rounds:
        if record.round_number == ROUNDS // 2:
            break
    rounds.close()
    print(f"stopped after round {record.round_number}: {rounds.folder}")

    run = perfedavg.run(resume=rounds.folder)  # no settings: they are the run's
    print(f"went on to its end: model {run.model_sha256[:12]}")
    print(f"one that is not stopped: {perfedavg.run(**SETTINGS).model_sha256[:12]}")

    best = run.clients[run.clients.population == "unseen"].nlargest(1, "personalized_accuracy").iloc[0]
    model = run.client_model(best.client_id)
    torch.save(model.state_dict(), "client.pt")
    print(f"client {best.client_id}: accuracy {best.personalized_accuracy:.3f}, model in client.pt")
