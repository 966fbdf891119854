"""A torchvision detector on fused kernels: inference on one image, and a training step."""

import torch
import torchvision

import fused_resnet as fr

model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
model = fr.fuse(model)
image = torch.rand(3, 320, 320)

model.eval()
with torch.inference_mode():
    (found,) = model([image])
print(f"{len(found['boxes'])} boxes")
for part in fr.explain(model, [image])[:3]:
    print(f"{part.name}: {part.path}, {part.share:.1%} of the work")

model.train()
target = {"boxes": torch.tensor([[10.0, 10.0, 200.0, 200.0]]), "labels": torch.tensor([1])}
losses = model([image], [target])
sum(losses.values()).backward()
print({name: round(float(loss.detach()), 3) for name, loss in losses.items()})
