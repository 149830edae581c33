"""A model and a method of one's own, trained by two workers: python examples/own_model_and_method.py [ROUNDS]"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where perfedavg is

from torch import Tensor, nn

import perfedavg
from perfedavg.fields import setting
from perfedavg.methods import FedAvg


def small_net(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Convolutions with BatchNorm, then the head. Its initial weights follow from the run's seed."""
    channels, *_ = input_shape
    body = nn.Sequential(nn.Conv2d(channels, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(6))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(8 * 6 * 6, num_classes))


@dataclass(frozen=True)
class SoftFedProx(FedAvg):
    """FedProx whose pull to the global model is the same for a parameter near it and one far away."""

    pull: float = setting(0.001, "size of the pull to the global model", at_least=0)

    def penalty(self, start: Tensor):
        return lambda parameters: self.pull * (parameters - start).sign()


if __name__ == "__main__":  # the workers import this file for the model and the method, and must begin no run
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rounds = perfedavg.rounds(
        workers=2,
        dataset="digits",
        model=small_net,
        method=SoftFedProx(pull=0.002),
        rounds=num_rounds,
        fine_tune_rounds=num_rounds // 2,
    )
    for record in rounds:
        print(f"{record.phase.label} round {record.round_number}: training loss {record.train_loss:.4f}")
    print(rounds.result.clients.groupby(["phase", "population"])[["initial_accuracy", "personalized_accuracy"]].mean())
