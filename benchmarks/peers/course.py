"""The course's loop: fp32, NCHW, the loss read at every step, Albumentations in two workers."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.peers.job import LR, Job
from transforms import train_transform


class Cifar(Dataset):
    """One image at a time through an Albumentations pipeline."""

    def __init__(self, job: Job):
        self.images, self.labels = job.images[: job.needed], job.labels
        self.transform = train_transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, np.int64]:
        return self.transform(image=self.images[index])["image"], self.labels[index]


def fit(job: Job) -> nn.Module:
    """Train for one pass over as many images as the job needs."""
    job.note = "fp32, NCHW"
    model = job.make_model().to(job.device)
    loader = DataLoader(Cifar(job), job.batch, shuffle=True, num_workers=job.workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    criterion = nn.CrossEntropyLoss()
    model.train()
    losses, correct, seen = [], 0, 0
    bar = tqdm(loader, mininterval=1)
    for images, labels in bar:
        images, labels = images.to(job.device), labels.to(job.device)
        optimizer.zero_grad()
        output = model(images)
        loss = criterion(output, labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        correct += output.argmax(dim=1).eq(labels).sum().item()
        seen += len(images)
        bar.set_description(f"loss {loss.item():.4f} accuracy {100 * correct / seen:.2f}")
        job.mark()
    return model
