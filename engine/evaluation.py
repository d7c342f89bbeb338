"""Accuracy on held-out images, of kNN and of classifiers, sharded over the ranks.

Each rank takes every world_size-th batch, and batches are cut in the order of the data: each is
computed alike whatever the number of processes, and every image counts once.
"""

import math

import torch
from tqdm import tqdm

from engine.datasets import ArrayDataset, evenly_spaced
from engine.launch import all_reduce_sum
from engine.loader import CenterCrops, UnreadableImages, create_loader, unpack_batches
from engine.signals import check_signals
from moco.augmentation import normalize
from moco.builder import l2_normalize
from moco.distributed import is_main, rank, world_size

EVAL_BATCH_SIZE = 256  # images of one forward pass on one rank
KNN_T = 0.07  # temperature of the votes (Wu et al. 2018, arXiv 1805.01978)


def iterate_eval_batches(
    dataset, indices, img_size, workers, env, unreadable=None, interpolation="bilinear"
):
    """This rank's batches of the images `indices` → positions in `indices` [n], normalized images.

    Images that can't be read are in no batch, and go to `unreadable`, an UnreadableImages; without
    it they are an error. All ranks call this and exhaust it: check_signals and unreadable.sync are
    collectives, and each rank calls them equally often, whatever its number of batches.
    """
    if isinstance(dataset, ArrayDataset):
        workers = 0  # starting them takes longer than to crop what is in memory
    chunks = torch.arange(len(indices)).split(EVAL_BATCH_SIZE)
    max_batches = math.ceil(len(chunks) / world_size())  # of the ranks with the most
    chunks = chunks[rank() :: world_size()]
    crops = CenterCrops(dataset, img_size, interpolation)
    loader = create_loader(crops, [indices[chunk] for chunk in chunks], workers, env.device)
    mean, std = dataset.pixel_format.mean, dataset.pixel_format.std
    for chunk, (images, positions) in zip(chunks, unpack_batches(loader, unreadable)):
        if len(positions):
            images = env.to_device(images)  # uint8 [n, C, H, W]
            yield chunk[positions], normalize(images.float() / 255, mean, std)
        check_signals()
    if len(chunks) < max_batches:
        check_signals()
    if unreadable is not None:
        unreadable.sync()


@torch.no_grad()
def accuracy(
    classify,
    num_classifiers,
    dataset,
    img_size,
    workers,
    env,
    unreadable=None,
    interpolation="bilinear",
):
    """Accuracy of several classifiers in one pass over labelled images → [(acc1, acc5)], in %.

    classify: normalized images [n, C, H, W] → a list of logits [n, num_classes], one for each
    classifier. With fewer than 5 classes acc5 is 100. An unreadable image counts as wrong.
    """
    correct = torch.zeros(num_classifiers, 2, dtype=torch.long, device=env.device)
    batches = iterate_eval_batches(
        dataset, torch.arange(len(dataset)), img_size, workers, env, unreadable, interpolation
    )
    for indices, images in batches:
        labels = dataset.labels[indices].to(env.device)[:, None]
        for i, logits in enumerate(classify(images)):
            hits = logits.topk(min(5, logits.shape[1])).indices == labels  # [n, 5]
            hits &= logits.isfinite().all(1, keepdim=True)  # a diverged classifier is always wrong
            correct[i] += torch.stack([hits[:, 0].sum(), hits.sum()])
    counts = all_reduce_sum(correct).tolist()
    return [(100 * top1 / len(dataset), 100 * top5 / len(dataset)) for top1, top5 in counts]


def format_accuracy(acc1, acc5, num_classes):
    """Percentages as text; top-5 means something from 5 classes on."""
    text = f"top-1 {acc1:.2f} %"
    return f"{text}, top-5 {acc5:.2f} %" if num_classes >= 5 else text


class KNN:
    """Weighted kNN accuracy of an encoder's features on held-out images (paper Sec. 4, Fig. 1).

    The bank: at most bank_size labelled training images (None: all), evenly spaced, un-augmented.
    k: 200 for a bank of 10,000 and more, else 20. Unreadable images are left out of the bank, and
    count as wrong among the held-out images.
    """

    def __init__(self, splits, img_size, bank_size, workers, env):
        num_images = len(splits.train_labelled)
        self.bank_indices = evenly_spaced(num_images, bank_size or num_images)
        self.k = min(200 if len(self.bank_indices) >= 10_000 else 20, len(self.bank_indices))
        self.splits, self.img_size, self.workers, self.env = splits, img_size, workers, env

    @torch.no_grad()
    def __call__(self, encoder, unreadable=None, k_values=None):
        """encoder: images → features [N, encoder.num_features] → accuracy in %, for each k."""
        was_training = encoder.training
        encoder.eval()
        bank, bank_labels = self._encode_bank(encoder, unreadable)
        k_values = [min(k, len(bank)) for k in k_values or [self.k]]

        val = self.splits.val
        correct = torch.zeros(len(k_values), dtype=torch.long, device=self.env.device)
        indices = torch.arange(len(val))
        for positions, queries in self._encode(encoder, val, indices, unreadable):
            labels = val.labels[positions].to(self.env.device)
            predicted = knn_predict(queries, bank, bank_labels, self.splits.num_classes, k_values)
            correct += (predicted == labels[:, None]).sum(0)
        encoder.train(was_training)
        return [100 * n / len(val) for n in all_reduce_sum(correct).tolist()]

    def _encode_bank(self, encoder, unreadable):
        """Features [b, d] and labels [b] of the bank's readable images, on every rank."""
        dataset, device = self.splits.train_labelled, self.env.device
        bank = torch.zeros(len(self.bank_indices), encoder.num_features, device=device)
        is_read = torch.zeros(len(bank), dtype=torch.long, device=device)
        for positions, h in self._encode(encoder, dataset, self.bank_indices, unreadable):
            bank[positions] = h
            is_read[positions] = 1
        # Each image's features are from one rank, and 0 on the others.
        bank, is_read = all_reduce_sum(bank), all_reduce_sum(is_read).bool()
        labels = dataset.labels[self.bank_indices].to(device)
        if not is_read.all():
            bank, labels = bank[is_read], labels[is_read]
        return bank, labels

    def _encode(self, encoder, dataset, indices, unreadable):
        """This rank's batches of `indices` → positions in `indices` [n], unit features [n, d]."""
        batches = iterate_eval_batches(
            dataset, indices, self.img_size, self.workers, self.env, unreadable
        )
        for positions, images in batches:
            with self.env.autocast():
                h = l2_normalize(encoder(images))
            yield positions, h


def knn_predict(queries, bank, labels, num_classes, k_values, T=KNN_T):
    """Votes of the k nearest, weighted by exp(similarity / T) → predicted class [n, len(k_values)].

    queries [n, d] and bank [b, d] have length 1; labels [b].
    """
    similarity, nearest = (queries @ bank.T).topk(max(k_values))  # [n, k], nearest first
    weights, nearest_labels = (similarity / T).exp(), labels[nearest]
    predicted = []
    for k in k_values:
        votes = queries.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, nearest_labels[:, :k], weights[:, :k])
        predicted.append(votes.argmax(1))
    return torch.stack(predicted, 1)


class AccuracyRecord:
    """The last and the best accuracy of each of a few classifiers; part of the checkpoint.

    last: [(acc1, acc5)], best: [(acc1, epoch)]; accuracy in percent.
    """

    def __init__(self, num_classifiers):
        self.last = [(0.0, 0.0)] * num_classifiers
        self.best = [(0.0, 0)] * num_classifiers

    def update(self, accuracies, epoch):
        """accuracies: [(acc1, acc5)] after `epoch` → whether each is the best so far."""
        self.last = [(acc1, acc5) for acc1, acc5 in accuracies]
        is_best = [acc1 > best[0] for (acc1, _), best in zip(self.last, self.best)]
        for i, (acc1, _) in enumerate(self.last):
            if is_best[i]:
                self.best[i] = (acc1, epoch)
        return is_best

    def state_dict(self):
        return dict(last=self.last, best=self.best)

    def load_state_dict(self, state):
        """TypeError if the state is not that of as many classifiers."""
        for name in ("last", "best"):
            pairs = state[name]
            if len(pairs) != len(self.last):
                raise TypeError(f"{name!r} is of {len(pairs)} classifiers, not {len(self.last)}")
            for pair in pairs:
                if len(pair) != 2 or not all(isinstance(value, int | float) for value in pair):
                    raise TypeError(f"{name!r} does not hold pairs of numbers")
            setattr(self, name, [tuple(pair) for pair in pairs])


@torch.no_grad()
def embed(encoder, dataset, indices, img_size, workers, env):
    """This rank's batches of the images `indices` → positions in `indices` [n], float32 [n, d].

    The second are the encoder's features. Images that can't be read are in no batch, and are
    reported on stderr. All ranks call this and exhaust it.
    """
    unreadable = UnreadableImages(max_fraction=1, num_images=len(dataset))
    batches = iterate_eval_batches(dataset, indices, img_size, workers, env, unreadable)
    hide_bar = None if is_main() else True  # None: where stderr is not a terminal
    with tqdm(total=len(indices), unit=" images", disable=hide_bar) as bar:
        for positions, images in batches:
            with env.autocast():
                h = encoder(images)
            yield positions, h.float()
            num_done = world_size() * len(positions)  # the other ranks' as well
            bar.update(min(num_done, len(indices) - bar.n))
