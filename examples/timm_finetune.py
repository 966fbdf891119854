"""Fine-tunes a timm model on fused kernels; the optimizer was made before the model was fused."""

import timm
import torch

import fused_resnet as fr

model = timm.create_model("resnet26d", pretrained=False, num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model = fr.fuse(model)  # the copy shares the parameters

images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
for step in range(3):
    loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
