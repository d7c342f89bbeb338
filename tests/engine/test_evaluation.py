"""The kNN monitor and the accuracy of classifiers, against the formula; how they are sharded."""

import pytest
import torch
from conftest import ENV, TINY, launch
from torch import nn

import engine.evaluation
from engine.backbones import BackboneConfig, create_backbone
from engine.data.images import ArrayDataset
from engine.data.splits import Splits, load_splits, open_source
from engine.evaluation import (
    KNN,
    AccuracyRecord,
    format_accuracy,
    iterate_eval_batches,
    knn_votes,
    measure_accuracy,
    rankme,
)
from engine.log import read_log
from moco import MoCo


def test_knn_matches_the_formula():
    bank = nn.functional.normalize(torch.randn(50, 8), dim=1)
    queries = nn.functional.normalize(torch.randn(20, 8), dim=1)
    labels = torch.randint(0, 4, (50,))
    k_values = [7, 1, 50]
    votes = knn_votes(queries, bank, labels, num_classes=4, k_values=k_values)
    for k, votes_of_k in zip(k_values, votes):
        for query, votes_of_query in zip(queries, votes_of_k):
            similarity, expected = bank @ query, torch.zeros(4)
            for i in similarity.argsort(descending=True)[:k]:
                expected[labels[i]] += torch.exp(similarity[i] / 0.07)
            torch.testing.assert_close(votes_of_query, expected)


class PixelEncoder(nn.Module):
    """An encoder whose features are the pixels of a digit."""

    num_features = 3 * 16 * 16

    def forward(self, x):
        return x.flatten(1)


def test_k_and_bank_follow_the_size_of_the_set():
    def create_knn(n, bank_size):
        images = ArrayDataset(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n))
        return KNN(Splits(images, images, ["a"]), (1, 1), bank_size, 0, ENV)

    assert create_knn(1000, 50_000).k == 20 and len(create_knn(1000, 50_000).bank_indices) == 1000
    assert create_knn(20_000, 50_000).k == 200 and create_knn(20_000, None).k == 200
    small = create_knn(20_000, 500)
    assert small.k == 20 and len(small.bank_indices.unique()) == 500
    assert create_knn(5, 10).k == 5


def test_the_pixels_of_digits_are_recognized():
    knn = KNN(load_splits(open_source("digits")), (16, 16), 50_000, 0, ENV)
    [acc1] = knn(PixelEncoder())
    assert acc1 > 97


def test_the_model_is_left_in_training_mode_and_unchanged():
    digits = load_splits(open_source("digits"))
    model = MoCo(create_backbone(BackboneConfig("resnet18", 16)), dim=8, mlp_dim=16)
    encoder = model.base_encoder.train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    KNN(digits, (16, 16), 100, 0, ENV)(encoder)
    assert encoder.training
    assert all(torch.equal(v, before[key]) for key, v in encoder.state_dict().items())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_whole_batches_in_the_order_of_the_data(world_size, monkeypatch):
    n = 600  # three batches, the last one smaller
    images = torch.arange(n).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8)
    dataset, indices = ArrayDataset(images), torch.arange(n).flip(0)
    signal_checks = []
    monkeypatch.setattr(engine.evaluation, "check_signals", lambda: signal_checks.append(rank))
    monkeypatch.setattr(engine.evaluation, "world_size", lambda: world_size)
    batches = {}
    for rank in range(world_size):
        monkeypatch.setattr(engine.evaluation, "rank", lambda rank=rank: rank)
        batches[rank] = [p for p, _ in iterate_eval_batches(dataset, indices, (4, 4), 0, ENV)]
    in_order = [batches[i % world_size][i // world_size] for i in range(3)]
    assert [len(batch) for batch in in_order] == [256, 256, 88]
    assert torch.equal(torch.cat(in_order), torch.arange(n))
    # A collective: each rank takes part equally often.
    assert len({signal_checks.count(rank) for rank in range(world_size)}) == 1


def test_accuracy_is_that_of_sorted_logits_and_a_diverged_classifier_is_wrong():
    n = 300
    labels = torch.randint(0, 10, (n,))
    images = torch.arange(n).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) % 256
    dataset = ArrayDataset(images.to(torch.uint8), labels)
    logits = torch.randn(n, 10)
    rest = logits.clone()

    def classify(batch):
        nonlocal rest
        mine, rest = rest[: len(batch)], rest[len(batch) :]
        return [mine, torch.full_like(mine, torch.nan)]

    first, diverged = measure_accuracy(classify, 2, dataset, (4, 4), 0, ENV)
    order = logits.argsort(1, descending=True)
    assert first[0] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    top5 = (order[:, :5] == labels[:, None]).any(1).float().mean().item()
    assert first[1] == pytest.approx(100 * top5) and diverged == (0, 0)


def test_scores_of_classes_without_images_are_kept():
    """A part of the classes is measured among all of them: a wrong one may win."""
    images = ArrayDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 1])
    logits = torch.tensor([[2.0, 1.0, 0.0, 0, 0, 0, 0], [1.0, 2.0, 3.0, 0, 0, 0, 0]])
    [(acc1, acc5)] = measure_accuracy(lambda x: [logits], 1, images, (4, 4), 0, ENV)
    assert (acc1, acc5) == (50, 100)


def test_top_5_is_told_from_5_classes_on():
    assert format_accuracy(50, 100, 4) == "top-1 50.00 %"
    assert format_accuracy(50, 75.125, 5) == "top-1 50.00 %, top-5 75.12 %"


def test_the_first_accuracy_is_the_best_so_far_even_if_it_is_0_percent():
    record = AccuracyRecord(2)
    assert record.update([(0.0, 1.0), (5.0, 6.0)], epoch=1) == [True, True]
    assert record.update([(0.0, 1.0), (6.0, 6.0)], epoch=2) == [False, True]
    assert record.best == [(0.0, 1), (6.0, 2)]


def test_rankme_matches_the_formula():
    z = torch.randn(200, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    for features in (z, z.T.contiguous()):  # more images than channels, and fewer
        s = torch.linalg.svdvals(features)
        p = s / s.sum() + 1e-7
        expected = torch.exp(-(p * p.log()).sum()).item()
        assert rankme(features) == pytest.approx(expected, rel=1e-9)


def test_rankme_counts_the_dimensions_that_features_use():
    orthogonal, _ = torch.linalg.qr(torch.randn(300, 32))
    assert rankme(orthogonal) == pytest.approx(32, rel=1e-4)
    assert rankme(orthogonal[:, :5] @ torch.eye(5, 32)) == pytest.approx(5, rel=1e-3)
    assert rankme(torch.ones(300, 32)) == pytest.approx(1, rel=1e-3)  # collapsed


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rankme_is_the_same_on_any_number_of_processes(processes, tmp_path):
    values = []
    for number in (1, processes):
        folder = tmp_path / str(number)
        flags = ("--batch-size", 300, "--epochs", 1, "--output-dir", folder, "--amp", "off")
        done = launch(number, "main_moco.py", *TINY, *flags)
        assert done.returncode == 0, done.stderr
        values.append(read_log(folder / "log.jsonl")[0]["rankme"])
    assert values[0] == values[1] > 1
