"""Grad-CAM in all its forms: layers as modules, one image, several layers, right answers."""

import torch
from torch import nn

from config import Config
from data import make_loaders
from main import predict, test, train
from models import ResNet18
from transforms import denormalize, normalize
from utils import get_device, seed_everything
from visualize import gradcam, overlay, plot_gradcam, plot_gradcam_layers, plot_misclassified

seed_everything(3)
device = get_device()
# theirs: train_loader, test_loader = dataloaders(512, device)
train_loader, _, test_loader = make_loaders(Config(batch_size=512), device)
model = ResNet18().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
train(model, device, train_loader, optimizer, nn.CrossEntropyLoss())
test(model, device, test_loader, nn.CrossEntropyLoss())
images, labels = next(iter(test_loader))
# theirs: heat = GradCAM(model=model, target_layers=[model.layer3[-1]])(images[:4], labels[:4])
heat = gradcam(model, images[:4], [model.layer3[-1]], labels[:4])
# theirs: mask = generate_gradcam(model, images[0], model.layer2, [int(labels[0])])
mask = gradcam(model, images[0], model.layer2, [int(labels[0])])
# theirs: picture = show_cam_on_image(denormalize(images[0]), mask[0])
picture = overlay(denormalize(images[0]), mask[0])
pixels = test_loader.dataset.data[:4]
# theirs: maps = cam(model, pixels, "layer3", [0, 1, 2, 3])
maps = gradcam(model, normalize(pixels), "layer3", [0, 1, 2, 3])
# theirs: predictions = infer(model, device, test_loader)
predictions = predict(model, device, test_loader)
plot_misclassified(predictions, count=10)
# theirs: plot_cam(model, predictions, target_layers=[model.layer2[-1]])
plot_gradcam(model, predictions, target_layers=[model.layer2[-1]])
# theirs: plot_cam_correct(model, predictions, [model.layer3[-1]], 6)
plot_gradcam(model, predictions, [model.layer3[-1]], 6, right=True)
# theirs: plot_cam_layers(model, predictions, [model.layer1, model.layer2, model.layer3], 3)
plot_gradcam_layers(model, predictions, [model.layer1, model.layer2, model.layer3], 3)
# theirs: grid(model, test_loader, ["layer1", "layer2", "layer3"])
plot_gradcam_layers(model, test_loader, layers=["layer1", "layer2", "layer3"])
