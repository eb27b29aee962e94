"""A plain loop with torchvision, in the style of pytorch-cifar: crop, flip, fp32, NCHW."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from benchmarks.peers.job import LR, MEAN, STD, Job


class Cifar(Dataset):
    """PIL images through torchvision's transforms, as its CIFAR10 gives them."""

    def __init__(self, job: Job):
        self.images, self.labels = job.images[: job.needed], job.labels
        steps = [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
        self.transform = T.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), int(self.labels[index])


def fit(job: Job) -> nn.Module:
    """Train for one pass over as many images as the job needs."""
    job.note = "fp32, NCHW"
    model = job.make_model().to(job.device)
    loader = DataLoader(Cifar(job), job.batch, shuffle=True, num_workers=job.workers)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    criterion = nn.CrossEntropyLoss()
    model.train()
    running, correct, total = 0.0, 0, 0
    for number, (images, targets) in enumerate(loader, 1):
        images, targets = images.to(job.device), targets.to(job.device)
        optimizer.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        running += loss.item()
        total += len(targets)
        correct += outputs.max(1)[1].eq(targets).sum().item()
        print(
            f"\r{number}/{len(loader)} loss {running / number:.3f} {100 * correct / total:.2f}%", end=""
        )
        job.mark()
    print()
    return model
