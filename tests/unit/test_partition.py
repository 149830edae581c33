"""How data reach clients: nothing lost, nothing twice, training and unseen clients apart, label mixes kept."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import DatasetRequest, load_federated_dataset
from datasets.clients.partition import Labels, Partition
from datasets.clients.partitioned import ImageSplits, PartitionedClients
from datasets.clients.split import SplitDataset

SCHEMES = [
    "shards:2",
    "shards:3",
    "iid",
    "dirichlet:0.1",
    "dirichlet:100",
    "quantity:1.5",
    "labels:2",
    "groups:2",
    "noise:0.2",
]


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
) -> SplitDataset:
    num_train = num_clients * 4 // 5
    dealt = clients(data, num_clients, partition, seed)
    return SplitDataset("test", dealt, num_train, num_clients - num_train, seed, local_split)


def indices(inputs: object) -> list[int]:
    pixels = (inputs * 255).round().long()[:, 0, 0, :2]
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def deal(labels: np.ndarray, num_clients: int, partition: str, seed: int = 0) -> list[np.ndarray]:
    return Partition.parse(partition).deal(Labels(labels, 5), num_clients, np.random.SeedSequence(seed))


@pytest.mark.parametrize("partition", SCHEMES)
@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=20, max_size=200), st.integers(5, 12), st.integers(0, 3))
def test_every_partition_loses_and_repeats_nothing(
    partition: str, labels: list[int], num_clients: int, seed: int
) -> None:
    dealt = deal(np.array(labels), num_clients, partition, seed)
    assert len(dealt) == num_clients
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))


EDGES = ["shards:3000", "shards:1e18", "shards:1e308", "dirichlet:1e-320", "dirichlet:0.001", "dirichlet:0.003"]
EDGES += ["dirichlet:1e18", "dirichlet:1e308", "quantity:1e-320", "quantity:700", "quantity:1e4", "quantity:1e308"]
EDGES += ["labels:5", "labels:1", "groups:1", "groups:7", "noise:1e-320", "noise:1e308"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("partition", EDGES)
@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), max_size=60), st.sampled_from([1, 2, 5, 8, 300]), st.integers(0, 2**32))
def test_at_its_edges_too_a_partition_loses_and_repeats_nothing(
    partition: str, labels: list[int], num_clients: int, seed: int
) -> None:
    """What would break: shares of 0/0 or of infinity, sizes below 0, a list of more shards than memory holds."""
    if partition.startswith(("labels", "groups")):
        num_clients = max(5, num_clients)
    dealt = deal(np.array(labels, dtype=np.int64), num_clients, partition, seed)
    assert len(dealt) == num_clients
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(labels)))


def largest_owners(partition: str, num_clients: int, seed: int) -> list[int]:
    """Of each of 5 classes of 40 examples, the client who has most of it."""
    labels = np.repeat(np.arange(5), 40)
    dealt = deal(labels, num_clients, partition, seed)
    counts = np.array([np.bincount(labels[part], minlength=5) for part in dealt])
    assert counts.max(axis=0).min() >= 20, "hardly a class is shared"
    return counts.argmax(axis=0).tolist()


@pytest.mark.parametrize("alpha", ["0.001", "1e-5", "1e-320"])
def test_the_smallest_dirichlet_gives_each_class_to_one_client_at_random(alpha: str) -> None:
    """Shares that underflow to 0/0 must not send their classes to the last client."""
    owners = [owner for seed in range(40) for owner in largest_owners(f"dirichlet:{alpha}", 4, seed)]
    counts = np.bincount(owners, minlength=4)
    assert counts.sum() == 200
    assert counts.min() > 25, "each of 4 clients gets a class in one of four draws: 50 of 200, deviation 6"


def test_the_largest_dirichlet_shares_each_class_equally() -> None:
    labels = np.repeat(np.arange(5), 40)
    for part in deal(labels, 4, "dirichlet:1e308"):
        assert np.bincount(labels[part]).tolist() == [10] * 5


@pytest.mark.parametrize("sigma", ["1e4", "1e308"])
def test_the_largest_quantity_skew_gives_all_to_one_client_at_random(sigma: str) -> None:
    labels = np.zeros(30, dtype=np.int64)
    sizes = np.array([[len(part) for part in deal(labels, 4, f"quantity:{sigma}", seed)] for seed in range(80)])
    assert sizes.max(axis=1).tolist() == [30] * 80
    assert np.bincount(sizes.argmax(axis=1), minlength=4).min() > 5, "20 of 80 each, deviation 4"


def test_more_shards_than_examples_are_examples_one_by_one() -> None:
    """No client gets more than its number of shards, and who gets which label is drawn at random."""
    labels = np.repeat([0, 1], 30)
    dealt = deal(labels, 40, "shards:2")
    assert max(map(len, dealt)) == 2
    assert len({tuple(labels[part]) for part in dealt if len(part) == 2}) > 1


def test_noise_beyond_floats_is_black_or_white() -> None:
    noisy = clients(splits(20, 10), 5, "noise:1e308").examples(2)[0]
    assert set(np.unique(noisy)) == {0, 255}


def test_too_many_clients_to_list_are_refused_at_once(tmp_path: Path) -> None:
    """A billion clients of digits would fill the memory before anybody says that they are empty."""
    request = DatasetRequest("digits", 10**9, lambda total: total // 5, "iid", 0)
    with pytest.raises(ValueError, match="--client_num_in_total 1000000000 is more than the 10000000 clients"):
        load_federated_dataset(request, tmp_path)


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
    with pytest.raises(ValueError, match=r"labels:2 needs at least as many clients as the 5 classes, .* has 4"):
        deal(np.arange(50) % 5, 4, "labels:2")


def test_clients_of_a_group_share_its_labels_equally_and_no_others() -> None:
    """Five classes by twos make three groups, of which the last has one class."""
    labels = np.arange(60) % 5
    dealt = deal(labels, 7, "groups:2")
    assert [sorted(set(labels[own].tolist())) for own in dealt] == 3 * [[0, 1]] + 2 * [[2, 3]] + 2 * [[4]]
    assert [len(own) for own in dealt] == [8, 8, 8, 12, 12, 6, 6]
    with pytest.raises(ValueError, match=r"groups:2 needs at least as many clients as the 3 groups .* has 2"):
        deal(labels, 2, "groups:2")


@pytest.mark.parametrize("partition", SCHEMES)
def test_without_unseen_clients_both_splits_are_dealt_out_to_those_that_train(partition: str) -> None:
    data = splits(200, 50)
    dealt = PartitionedClients(data, Partition.parse(partition), 10, 0, seed=0)
    found = [
        (int(image[0, 0]), int(label))
        for client in range(10)
        for image, label in zip(*dealt.examples(client), strict=True)
    ]
    everything = [*enumerate(data.train_labels), *enumerate(data.test_labels)]
    if partition != "noise:0.2":  # which changes the pixel that says which image it is
        assert sorted(found) == sorted((number, int(label)) for number, label in everything)
    assert len(found) == 250


@pytest.mark.parametrize(("fraction", "expected"), [("0.2", 8), ("1/4", 7), ("0.75", 2), ("0.99", 1), ("0.01", 9)])
def test_the_share_of_the_test_part_is_rounded_up_and_leaves_one_example_to_train_on(
    fraction: str, expected: int
) -> None:
    data = SplitDataset("test", clients(splits(80, 20), 10, "iid"), 8, 2, seed=0, test_fraction=Fraction(fraction))
    cut = data.client_data(0)
    assert (data.num_train_examples(0), len(cut.train_labels), len(cut.test_labels)) == (
        expected,
        expected,
        10 - expected,
    )


def test_the_test_parts_share_is_in_the_fingerprint() -> None:
    dealt = clients(splits(80, 20), 10, "iid")
    prints = [
        SplitDataset("test", dealt, 8, 2, seed=0, test_fraction=share).fingerprint
        for share in (Fraction("0.2"), Fraction(1, 5), Fraction("0.25"))
    ]
    assert prints[0] == prints[1] != prints[2]


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
