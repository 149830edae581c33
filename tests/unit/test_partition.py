"""How data reaches clients: nothing lost, nothing twice, training and unseen clients apart, label mixes kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.federated import FederatedDataset, ImageSplits
from datasets.partition import label_shards


def splits(num_train: int, num_test: int, num_classes: int = 5) -> ImageSplits:
    """Images that hold their own index in their first pixels, so that a test can tell which one it sees."""

    def images(count: int) -> np.ndarray:
        result = np.zeros((count, 28, 28), dtype=np.uint8)
        result[:, 0, 0], result[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
        return result

    labels = [np.random.default_rng(count).integers(0, num_classes, count) for count in (num_train, num_test)]
    return ImageSplits(images(num_train), labels[0], images(num_test), labels[1], num_classes)


def indices(inputs: object) -> list[int]:
    pixels = (inputs * 255).round().long()[:, 0, 0, :2]
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


@given(st.lists(st.integers(0, 4), min_size=20, max_size=200), st.integers(1, 10), st.integers(0, 3))
def test_shards_lose_and_repeat_nothing(labels: list[int], num_clients: int, seed: int) -> None:
    array = np.array(labels)
    clients = label_shards(array, num_clients, np.random.SeedSequence(seed))
    assert sorted(np.concatenate(clients).tolist()) == list(range(len(labels)))
    sizes = [len(client) for client in clients]
    assert max(sizes) - min(sizes) <= 2  # two shards, whose sizes differ by one at most


def test_a_shard_is_a_run_of_the_label_sorted_examples() -> None:
    labels = np.repeat(np.arange(10), 20)[np.random.default_rng(0).permutation(200)]
    for client in label_shards(labels, 10, np.random.SeedSequence(0)):
        assert len(set(labels[client])) <= 2


def test_shards_follow_from_their_stream_and_leave_numpys_generator_alone() -> None:
    labels = np.arange(100) % 10
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    one, same, other = (label_shards(labels, 5, np.random.SeedSequence(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert np.array_equal(np.random.get_state()[1], before)


def test_every_example_belongs_to_one_client_and_one_part() -> None:
    dataset = FederatedDataset("test", splits(800, 200), num_clients=20, seed=0)
    assert list(dataset.train_client_ids) == list(range(16))
    assert list(dataset.unseen_client_ids) == list(range(16, 20))
    for client_ids, total in ((dataset.train_client_ids, 800), (dataset.unseen_client_ids, 200)):
        seen = []
        for client_id in client_ids:
            data = dataset.client_data(client_id)
            assert len(data.train_labels) == dataset.num_train_examples(client_id) == 40
            assert len(data.test_labels) == 10
            seen += indices(data.train_inputs) + indices(data.test_inputs)
        assert sorted(seen) == list(range(total))


def test_inputs_and_labels_stay_together() -> None:
    data = splits(800, 200)
    dataset = FederatedDataset("test", data, num_clients=20, seed=0)
    client = dataset.client_data(17)
    assert client.test_labels.tolist() == data.test_labels[indices(client.test_inputs)].tolist()
    assert client.train_inputs.max() <= 1


def test_both_parts_of_a_client_have_its_label_mix() -> None:
    """Cut without shuffling, the test part of nearly every client would hold a single label, the one sorted last."""
    dataset = FederatedDataset("test", splits(8000, 2000), num_clients=20, seed=0)
    mixed = 0
    for client_id in dataset.unseen_client_ids:
        data = dataset.client_data(client_id)
        train, test = set(data.train_labels.tolist()), set(data.test_labels.tolist())
        assert test <= train
        mixed += len(test) > 1
    assert mixed >= 3


def test_the_same_seed_deals_the_same_data_and_the_fingerprint_says_so() -> None:
    one, same, other = (FederatedDataset("test", splits(800, 200), 20, seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    changed = splits(800, 200)
    changed.test_images[199, 27, 27] = 1
    assert FederatedDataset("test", changed, 20, 0).fingerprint != one.fingerprint


def test_too_many_clients_are_refused_with_the_largest_number() -> None:
    with pytest.raises(ValueError, match=r"--client_num_in_total 500 leaves fewer than 4 .* lower it to 250 or less"):
        FederatedDataset("test", splits(8000, 200), num_clients=500, seed=0)
    FederatedDataset("test", splits(8000, 200), num_clients=250, seed=0)
