"""Much that is asked of the datasets: their length, single images, labels, pixels."""

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from config import Config
from data import make_loaders
from main import predict, test, train
from models import CustomResNet
from transforms import denormalize
from utils import get_device
from visualize import class_counts, plot_confusion_matrix, plot_misclassified, plot_samples

device = get_device()
# theirs: train_loader, test_loader = CIFAR10Data(batch_size=128).loaders()
train_loader, _, test_loader = make_loaders(Config(batch_size=128), device)
print("images", len(train_loader.dataset))
print("classes", train_loader.dataset.classes)
print("shape", train_loader.dataset.data.shape)
mean = train_loader.dataset.data.mean(axis=(0, 1, 2)) / 255
counts = Counter(train_loader.dataset.targets)
image, label = train_loader.dataset[0]
plt.imshow(denormalize(image))
plt.show()
plt.imshow(test_loader.dataset.data[5])
plt.title(test_loader.dataset.classes[test_loader.dataset.targets[5]])
plt.show()
first = [test_loader.dataset[k] for k in range(8)]
batch = torch.stack([image for image, _ in first])
plot_samples(batch, [label for _, label in first], test_loader.dataset.classes)
few = DataLoader(Subset(test_loader.dataset, range(64)), batch_size=16, shuffle=False)
cats = np.flatnonzero(np.array(test_loader.dataset.targets) == 3)
# theirs: label_counts(train_loader.dataset.targets, train_loader.dataset.classes)
class_counts(train_loader.dataset.targets, train_loader.dataset.classes)
model = CustomResNet()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
train(model, device, train_loader, optimizer)
test(model, device, few)
found = predict(model, device, few)
plot_misclassified(found, test_loader.dataset.classes)
plot_confusion_matrix(found, test_loader.dataset.classes)
