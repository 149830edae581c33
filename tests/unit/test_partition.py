"""How data reach clients: nothing lost, nothing twice, training and unseen clients apart, label mixes kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import FederatedDataset, ImageSplits, Partition, PartitionedClients

SCHEMES = ["shards:2", "shards:3", "iid", "dirichlet:0.1", "dirichlet:100", "quantity:1.5", "labels:2", "noise:0.2"]


def splits(num_train: int, num_test: int, num_classes: int = 5) -> ImageSplits:
    """Images that hold their own index in their first pixels, so that a test can tell which one it sees."""

    def images(count: int) -> np.ndarray:
        result = np.zeros((count, 28, 28), dtype=np.uint8)
        result[:, 0, 0], result[:, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
        return result

    labels = [np.random.default_rng(count).integers(0, num_classes, count) for count in (num_train, num_test)]
    return ImageSplits(images(num_train), labels[0], images(num_test), labels[1], num_classes)


def clients(data: ImageSplits, num_clients: int, partition: str = "shards:2", seed: int = 0) -> PartitionedClients:
    num_train = num_clients * 4 // 5
    return PartitionedClients(data, Partition.parse(partition), num_train, num_clients - num_train, seed)


def federated(
    data: ImageSplits, num_clients: int, partition: str = "shards:2", seed: int = 0, local_split: str = "shuffled"
) -> FederatedDataset:
    num_train = num_clients * 4 // 5
    dealt = clients(data, num_clients, partition, seed)
    return FederatedDataset("test", dealt, num_train, num_clients - num_train, seed, local_split)


def indices(inputs: object) -> list[int]:
    pixels = (inputs * 255).round().long()[:, 0, 0, :2]
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def deal(labels: np.ndarray, num_clients: int, partition: str, seed: int = 0) -> list[np.ndarray]:
    return Partition.parse(partition).deal(labels, num_clients, 5, np.random.SeedSequence(seed))


@pytest.mark.parametrize("partition", SCHEMES)
@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=20, max_size=200), st.integers(5, 12), st.integers(0, 3))
def test_every_partition_loses_and_repeats_nothing(
    partition: str, labels: list[int], num_clients: int, seed: int
) -> None:
    dealt = deal(np.array(labels), num_clients, partition, seed)
    assert len(dealt) == num_clients
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("partition", SCHEMES)
def test_a_partition_follows_from_its_stream_and_leaves_numpys_generator_alone(partition: str) -> None:
    labels = np.arange(100) % 5
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    one, same, other = (deal(labels, 5, partition, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert np.array_equal(np.random.get_state()[1], before)


def test_each_partition_is_skewed_in_its_own_way() -> None:
    """What would break: a scheme that deals like another one."""
    labels = np.random.default_rng(0).integers(0, 5, 5000)

    def classes(partition: str) -> float:
        return float(np.median([len(set(labels[client])) for client in deal(labels, 20, partition)]))

    def spread(partition: str) -> float:
        sizes = [len(client) for client in deal(labels, 20, partition)]
        return max(sizes) / max(1, min(sizes))

    assert classes("shards:2") <= 3
    assert classes("labels:2") == 2
    assert classes("labels:1") == 1
    assert classes("iid") == classes("dirichlet:100") == classes("quantity:0.1") == 5
    assert classes("dirichlet:0.05") < 4
    assert spread("iid") == 1
    assert spread("shards:2") < 1.1
    assert spread("quantity:0.1") < 2 < 5 < spread("quantity:1.5")


def test_noise_grows_from_client_to_client_and_is_always_the_same() -> None:
    """Client i of N has a standard deviation of 0.2 (i + 1) / N, half of it cut off at black."""
    data = ImageSplits(*(np.full((n, 28, 28), 128, np.uint8) if i % 2 == 0 else np.arange(n) % 5
                         for i, n in enumerate((400, 400, 100, 100))), num_classes=5)  # fmt: skip
    noisy = clients(data, 10, "noise:0.2")
    deviations = [noisy.examples(client)[0].std() / 255 for client in range(8)]
    assert deviations == pytest.approx([0.2 * (i + 1) / 8 for i in range(8)], rel=0.05)
    assert np.array_equal(noisy.examples(3)[0], noisy.examples(3)[0])
    assert clients(data, 10, "iid").fingerprint != noisy.fingerprint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cards", "--partition cards is unknown; use shards:N, iid"),
        ("iid:3", "--partition iid:3 is unknown"),
        ("shards:1.5", "must be a whole number from 1"),
        ("shards:0", "must be a whole number from 1"),
        ("dirichlet:-1", "must be a number above 0"),
        ("dirichlet:x", "must be a number above 0"),
        ("quantity:inf", "must be a number above 0"),
    ],
)
def test_malformed_partitions_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Partition.parse(text)


def test_labels_a_client_need_a_client_for_each_class() -> None:
    with pytest.raises(ValueError, match=r"labels:2 needs at least as many clients as the 5 classes .* has 4"):
        deal(np.arange(50) % 5, 4, "labels:2")


def test_the_number_behind_the_colon_has_a_default() -> None:
    assert Partition.parse("shards") == Partition("shards", 2)
    assert Partition.parse("dirichlet").value == 0.5


@pytest.mark.parametrize("partition", ["shards:2", "iid", "dirichlet:1"])
def test_every_example_belongs_to_one_client_and_one_part(partition: str) -> None:
    dataset = federated(splits(800, 200), 20, partition)
    assert set(dataset.train_client_ids) <= set(range(16))
    assert set(dataset.unseen_client_ids) <= set(range(16, 20))
    assert dataset.num_left_out == 0
    for client_ids, total in ((dataset.train_client_ids, 800), (dataset.unseen_client_ids, 200)):
        seen = []
        for client_id in client_ids:
            data = dataset.client_data(client_id)
            assert len(data.train_labels) == dataset.num_train_examples(client_id) >= 1
            assert len(data.test_labels) >= 1
            seen += indices(data.train_inputs) + indices(data.test_inputs)
        assert sorted(seen) == list(range(total))


def test_inputs_and_labels_stay_together() -> None:
    data = splits(800, 200)
    client = federated(data, 20).client_data(17)
    assert client.test_labels.tolist() == data.test_labels[indices(client.test_inputs)].tolist()
    assert client.train_inputs.max() <= 1


def test_both_parts_of_a_client_have_its_label_mix() -> None:
    """Cut without shuffling, the test part of nearly every client would hold a single label, the one sorted last."""
    dataset = federated(splits(8000, 2000), 20)
    mixed = 0
    for client_id in dataset.unseen_client_ids:
        data = dataset.client_data(client_id)
        train, test = set(data.train_labels.tolist()), set(data.test_labels.tolist())
        assert test <= train
        mixed += len(test) > 1
    assert mixed >= 3


@pytest.mark.parametrize("partition", ["shards:2", "iid"])
def test_cut_at_the_tail_the_test_part_has_the_last_labels_only(partition: str) -> None:
    """As in the code behind the published figures: each client has the same examples, sorted before they are cut."""
    shuffled = federated(splits(800, 200), 20, partition)
    tail = federated(splits(800, 200), 20, partition, local_split="tail")
    num_labels = []
    for client_id in (*tail.train_client_ids, *tail.unseen_client_ids):
        data, other = tail.client_data(client_id), shuffled.client_data(client_id)
        assert data.train_labels.tolist() == sorted(data.train_labels.tolist())
        assert data.train_labels.max() <= data.test_labels.min()
        assert len(data.train_labels) == len(other.train_labels) == tail.num_train_examples(client_id)
        examples = [sorted(indices(part.train_inputs) + indices(part.test_inputs)) for part in (data, other)]
        assert examples[0] == examples[1]
        num_labels.append(len(set(data.test_labels.tolist())))
    assert num_labels.count(1) > len(num_labels) / 2, "often a single one"
    assert tail.fingerprint != shuffled.fingerprint


def test_the_tail_keeps_inputs_and_labels_together() -> None:
    data = splits(800, 200)
    client = federated(data, 20, local_split="tail").client_data(17)
    assert client.test_labels.tolist() == data.test_labels[indices(client.test_inputs)].tolist()


def test_the_same_seed_deals_the_same_data_and_the_fingerprint_says_so() -> None:
    one, same, other = (federated(splits(800, 200), 20, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    changed = splits(800, 200)
    changed.test_images[199, 27, 27] = 1
    assert federated(changed, 20).fingerprint != one.fingerprint
    assert federated(splits(800, 200), 20, "iid").fingerprint != one.fingerprint


def test_clients_too_small_for_both_parts_are_left_out_and_counted() -> None:
    dataset = federated(splits(100, 40), 100, "dirichlet:0.1")
    used = [*dataset.train_client_ids, *dataset.unseen_client_ids]
    assert dataset.num_left_out == 100 - len(used) > 10
    for client_id in used:
        data = dataset.client_data(client_id)
        assert len(data.train_labels) >= 1
        assert len(data.test_labels) >= 1


def test_nobody_left_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"500 of 500 clients of test have fewer than 2 examples.*use fewer clients"):
        federated(splits(100, 40), 500, "iid")
