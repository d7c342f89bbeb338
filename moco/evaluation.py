"""Accuracy of frozen features: the kNN monitor, sharded over the ranks."""

import torch
import torch.distributed as dist

from moco import UserError, data
from moco.augment import normalize
from moco.builder import features, unit
from moco.distributed import gather, rank, world

BATCH = 256  # images of one forward pass on one rank
KNN_T = 0.07  # temperature of the votes (Wu et al. 2018, arXiv 1805.01978)


class KNN:
    """Weighted kNN accuracy of an encoder's features on held-out images (paper Sec. 4, Fig. 1).

    bank: at most `bank_size` training images, the same ones each time, un-augmented. k: 200 for a
    bank of 10,000 and more, 20 for a smaller one. Every image counts once on any number of ranks.
    """

    def __init__(self, dataset, size, bank_size, workers, device):
        size_of_bank = min(bank_size, len(dataset.bank))
        if min(size_of_bank, len(dataset.val)) < world():
            raise UserError("kNN needs an image of bank and val for each process: --knn-every 0")
        self.chosen = torch.arange(size_of_bank) * len(dataset.bank) // size_of_bank
        self.k = min(200 if len(self.chosen) >= 10_000 else 20, len(self.chosen))
        self.data, self.size, self.device = dataset, size, device
        # Starting workers takes longer than to hand over what is in memory already.
        self.workers = workers if isinstance(dataset.val, data.Files) else 0

    @torch.no_grad()
    def __call__(self, encoder, autocast):
        """encoder, a context for its forward pass → accuracy in percent, the same on every rank."""
        training = encoder.training
        encoder.eval()
        bank = gather_rows(self._features(encoder, autocast, self.data.bank, self.chosen))
        bank = bank[: len(self.chosen)]
        labels = self.data.bank.labels[self.chosen].to(self.device)

        mine = torch.arange(rank(), len(self.data.val), world())
        queries = self._features(encoder, autocast, self.data.val, torch.arange(len(self.data.val)))
        right = knn(queries, bank, labels, self.data.classes, self.k).cpu()
        right = (right == self.data.val.labels[mine]).sum().to(self.device)
        if world() > 1:
            dist.all_reduce(right)
        encoder.train(training)
        return 100 * right.item() / len(self.data.val)

    def _features(self, encoder, autocast, source, indices):
        """Normalised features of this rank's share, indices[rank::world] → [n, d]."""
        share = indices[rank() :: world()].split(BATCH)
        loader = data.create_loader(
            data.CentreCrop(source, self.size), share, self.workers, self.device
        )
        found = []
        for images in data.checked(loader):
            images = images.to(self.device, non_blocking=self.device.type == "cuda")
            with autocast():
                found.append(unit(features(encoder, normalize(images.float() / 255))))
        return torch.cat(found)


def knn(queries, bank, labels, classes, k, T=KNN_T):
    """Votes of the k nearest, weighted by exp(similarity/T): normalised [n, d], [b, d] → [n]."""
    answers = []
    for q in queries.split(1024):
        similarity, nearest = (q @ bank.T).topk(k)  # [n, k]
        votes = q.new_zeros(len(q), classes)
        votes.scatter_add_(1, labels[nearest], (similarity / T).exp())
        answers.append(votes.argmax(1))
    return torch.cat(answers)


def gather_rows(x):
    """Shares dealt out in turn, [n_r, d] on rank r → all rows in order on every rank.

    Ranks may hold one row less than rank 0: the gap shows as a last row of zeros, to be cut off.
    """
    if world() == 1:
        return x
    longest = torch.tensor(len(x), device=x.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = x.new_zeros(int(longest), x.shape[1])
    padded[: len(x)] = x
    return gather(padded).transpose(0, 1).flatten(0, 1)
