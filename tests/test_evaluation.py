"""The kNN monitor against the formula, and its sharding."""

import contextlib

import torch
from torch import nn

from moco.backbones import create_backbone
from moco.evaluation import KNN, knn
from moco.sources import Arrays, Data, load_data


def test_knn_matches_the_formula():
    bank = nn.functional.normalize(torch.randn(50, 8), dim=1)
    queries = nn.functional.normalize(torch.randn(20, 8), dim=1)
    labels = torch.randint(0, 4, (50,))
    answers = knn(queries, bank, labels, classes=4, ks=[7, 1, 50])
    for query, found in zip(queries, answers):
        for k, answer in zip((7, 1, 50), found):
            similarity = bank @ query
            votes = [0.0] * 4
            for i in similarity.argsort(descending=True)[:k]:
                votes[labels[i]] += torch.exp(similarity[i] / 0.07).item()
            assert answer == max(range(4), key=votes.__getitem__)


class Pixels(nn.Module):
    """An encoder whose features are the pixels of a digit."""

    num_features = 3 * 16 * 16

    def forward_features(self, x):
        return x.flatten(1)

    def forward_head(self, x, pre_logits):
        return x


def test_k_and_bank_follow_the_size_of_the_set():
    def monitor(n, bank_size):
        images = Arrays(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n))
        data = Data(images, images, images, 1)
        return KNN(data, (1, 1), bank_size, 0, torch.device("cpu"))

    assert monitor(1000, 50_000).k == 20 and len(monitor(1000, 50_000).chosen) == 1000
    assert monitor(20_000, 50_000).k == 200
    assert monitor(20_000, 500).k == 20 and len(monitor(20_000, 500).chosen.unique()) == 500
    assert monitor(5, 10).k == 5


def test_digits_pixels_are_recognised():
    monitor = KNN(load_data("digits"), (16, 16), 50_000, 0, torch.device("cpu"))
    [accuracy] = monitor(Pixels(), contextlib.nullcontext)
    assert accuracy > 97


def test_the_model_is_left_in_training_mode_and_unchanged():
    digits = load_data("digits")
    encoder = create_backbone("resnet18", 16).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    KNN(digits, (16, 16), 100, 0, torch.device("cpu"))(encoder, contextlib.nullcontext)
    assert encoder.training
    assert all(torch.equal(v, before[key]) for key, v in encoder.state_dict().items())
