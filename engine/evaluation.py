"""Accuracy on held-out images, of kNN and of classifiers, sharded over the ranks.

Each rank takes every world_size-th batch, and batches are cut in the order of the data: each is
computed alike whatever the number of processes, and every image counts once.
"""

import math

import torch

from engine.backbones import eval_mode
from engine.data.crops import CenterCrops
from engine.data.images import ArrayDataset, evenly_spaced
from engine.data.loader import create_loader, unpack_batches
from engine.errors import UserError
from engine.launch import all_reduce_sum
from engine.signals import check_signals
from moco.augmentation import normalize
from moco.builder import l2_normalize
from moco.distributed import rank, world_size

EVAL_BATCH_SIZE = 256  # images of one forward pass on one rank
RANKME_IMAGES = 25_600  # as in its paper
KNN_T = 0.07  # temperature of the votes (Wu et al. 2018, arXiv 1805.01978)


def eagerly(function):
    """Of a compiled backbone: other sizes of a batch, in eval mode, would be compiled anew."""
    return torch.compiler.set_stance("force_eager")(function)


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
    crop_dataset = CenterCrops(dataset, img_size, interpolation)
    loader = create_loader(crop_dataset, [indices[chunk] for chunk in chunks], workers, env.device)
    mean, std = dataset.pixel_format.mean, dataset.pixel_format.std
    for chunk, (images, positions) in zip(chunks, unpack_batches(loader, unreadable, dataset)):
        if len(positions):
            images = env.to_device(images)  # uint8 [n, C, H, W]
            yield chunk[positions], normalize(images.float() / 255, mean, std)
        elif unreadable is not None:
            unreadable.check_batch(len(chunk), dataset)
        check_signals()
    if len(chunks) < max_batches:
        check_signals()
    if unreadable is not None:
        unreadable.sync(dataset)


@torch.no_grad()
@eagerly
def measure_accuracy(
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
    classifier. With fewer than 5 classes acc5 is 100. An unreadable image counts as wrong;
    UserError if all are unreadable.
    """
    correct = torch.zeros(num_classifiers, 2, dtype=torch.long, device=env.device)
    num_read = torch.zeros((), dtype=torch.long, device=env.device)
    settings = img_size, workers, env, unreadable, interpolation
    for indices, images in iterate_eval_batches(dataset, torch.arange(len(dataset)), *settings):
        num_read += len(indices)
        labels = dataset.labels[indices].to(env.device)[:, None]
        for i, logits in enumerate(classify(images)):
            hits = logits.topk(min(5, logits.shape[1])).indices == labels  # [n, 5]
            hits &= logits.isfinite().all(1, keepdim=True)  # a diverged classifier is always wrong
            correct[i] += torch.stack([hits[:, 0].sum(), hits.sum()])
    if all_reduce_sum(num_read) == 0:
        text = f"none of the {len(dataset):,} images to validate could be read"
        raise UserError(text, exit_code=1)
    counts = all_reduce_sum(correct).tolist()
    return [(100 * top1 / len(dataset), 100 * top5 / len(dataset)) for top1, top5 in counts]


def format_accuracy(acc1, acc5, num_classes):
    """Percentages as text; top-5 means something from 5 classes on."""
    text = f"top-1 {acc1:.2f} %"
    return f"{text}, top-5 {acc5:.2f} %" if num_classes >= 5 else text


@torch.no_grad()
@eagerly
def encode_dataset(encoder, dataset, indices, img_size, workers, env, unreadable=None):
    """Features of the images `indices` on every rank → float32 [n, d], which were read [n].

    encoder: images → features [N, encoder.num_features], in eval mode. Unreadable images are 0.
    """
    features = torch.zeros(len(indices), encoder.num_features, device=env.device)
    is_read = torch.zeros(len(indices), dtype=torch.long, device=env.device)
    batches = iterate_eval_batches(dataset, indices, img_size, workers, env, unreadable)
    for positions, images in batches:
        with env.autocast():
            h = encoder(images)
        features[positions] = h.float()
        is_read[positions] = 1
    # Each image's features are from one rank, and 0 on the others.
    return all_reduce_sum(features), all_reduce_sum(is_read).bool()


class KNN:
    """Weighted kNN accuracy of an encoder's features on held-out images (paper Sec. 4, Fig. 1).

    The bank: at most bank_size labelled training images (None: all), evenly spaced, un-augmented.
    k: 200 for a bank of 10,000 and more, else 20. Unreadable images are left out of the bank, and
    count as wrong among the held-out images. num_read: images of the bank in the last measurement.
    """

    def __init__(self, splits, img_size, bank_size, workers, env):
        num_images = len(splits.train)
        self.bank_indices = evenly_spaced(num_images, bank_size or num_images)
        self.k = min(200 if len(self.bank_indices) >= 10_000 else 20, len(self.bank_indices))
        self.splits, self.settings, self.env = splits, (img_size, workers, env), env

    @torch.no_grad()
    def __call__(self, encoder, unreadable=None, k_values=None):
        """encoder: images → features [N, encoder.num_features] → accuracy in %, for each k."""
        with eval_mode(encoder):
            bank, is_read = self.encode_bank(encoder, unreadable)
            return self.measure(encoder, bank, is_read, unreadable, k_values)

    def encode_bank(self, encoder, unreadable=None):
        """Features [b, d] of the bank's images, which of them were read [b]; on every rank."""
        dataset = self.splits.train
        return encode_dataset(encoder, dataset, self.bank_indices, *self.settings, unreadable)

    def measure(self, encoder, bank, is_read, unreadable=None, k_values=None):
        """bank, is_read: as encode_bank returns them → accuracy in %, for each k."""
        labels = self.splits.train.labels[self.bank_indices].to(self.env.device)
        if not is_read.all():
            bank, labels = bank[is_read], labels[is_read]
        if len(bank) == 0:
            text = "kNN has no image to search: none of its bank could be read"
            raise UserError(text, exit_code=1)
        self.num_read = len(bank)
        bank, num_classes = l2_normalize(bank), self.splits.num_classes
        k_values = [min(k, len(bank)) for k in k_values or [self.k]]

        def classify(images):
            with self.env.autocast():
                queries = encoder(images)
            return knn_votes(l2_normalize(queries), bank, labels, num_classes, k_values)

        val = self.splits.val
        found = measure_accuracy(classify, len(k_values), val, *self.settings, unreadable)
        return [acc1 for acc1, _ in found]


class FeatureMonitor:
    """The quality of features during pre-training: RankMe, and kNN where there are labels.

    dataset: the training images; knn_splits: labelled ones for kNN, the same or others, or None.
    RankMe is that of at most RANKME_IMAGES training images, which kNN's bank may hold already.
    """

    def __init__(self, dataset, knn_splits, img_size, bank_size, workers, env):
        self.knn = None
        if knn_splits is not None:
            self.knn = KNN(knn_splits, img_size, bank_size, workers, env)
        self.dataset, self.settings = dataset, (img_size, workers, env)
        self.shares_bank = (
            self.knn is not None
            and knn_splits.train is dataset
            and len(self.knn.bank_indices) >= min(len(dataset), RANKME_IMAGES)
        )

    @torch.no_grad()
    def __call__(self, encoder, unreadable=None):
        """→ {"knn": accuracy in %, "rankme": effective rank}, without knn where labels lack."""
        values = {}
        with eval_mode(encoder):
            if self.knn is not None:
                h, is_read = self.knn.encode_bank(encoder, unreadable)
                [values["knn"]] = self.knn.measure(encoder, h, is_read, unreadable)
            if not self.shares_bank:
                indices = evenly_spaced(len(self.dataset), RANKME_IMAGES)
                h, is_read = encode_dataset(
                    encoder, self.dataset, indices, *self.settings, unreadable
                )
        h = h[is_read]
        indices = evenly_spaced(len(h), RANKME_IMAGES).to(h.device)
        return values | {"rankme": rankme(h[indices])}


def rankme(features, eps=1e-7):
    """Effective rank of features [n, d], from 1 (collapsed) to min(n, d).

    exp(−Σ p·log p) of the normalized singular values p (Garrido et al. 2023, arXiv 2210.02885).
    """
    z = features.double().cpu()
    n, d = z.shape
    gram = z @ z.T if n < d else z.T @ z  # singular values² are its eigenvalues
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum() + eps
    return torch.exp(-(p * p.log()).sum()).item()


def knn_votes(queries, bank, labels, num_classes, k_values, T=KNN_T):
    """Votes of the k nearest, weighted by exp(similarity / T) → [n, num_classes] for each k.

    queries [n, d] and bank [b, d] have length 1; labels [b].
    """
    similarity, nearest = (queries @ bank.T).topk(max(k_values))  # [n, k], nearest first
    weights, nearest_labels = (similarity / T).exp(), labels[nearest]
    zeros = queries.new_zeros(len(queries), num_classes)
    return [zeros.scatter_add(1, nearest_labels[:, :k], weights[:, :k]) for k in k_values]


class AccuracyRecord:
    """The last and the best accuracy of each of a few classifiers; part of the checkpoint.

    last: [(acc1, acc5)], best: [(acc1, epoch)]; accuracy in percent.
    """

    def __init__(self, num_classifiers):
        self.last = [(0.0, 0.0)] * num_classifiers
        self.best = [(0.0, 0)] * num_classifiers

    def update(self, accuracies, epoch):
        """accuracies: [(acc1, acc5)] after `epoch` → whether each is the best so far."""
        self.last = accuracies
        is_best = []
        for i, (acc1, _) in enumerate(self.last):
            best_acc1, best_epoch = self.best[i]
            is_best.append(acc1 > best_acc1 or best_epoch == 0)  # the first, even if it is 0 %
            if is_best[i]:
                self.best[i] = (acc1, epoch)
        return is_best

    def state_dict(self):
        return dict(last=self.last, best=self.best)

    def load_state_dict(self, state):
        self.last, self.best = state["last"], state["best"]
