"""torchvision's DeepLabV3 on fused kernels, in bfloat16 by autocast."""

import torch
import torchvision

import fused_resnet as fr

model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
model = fr.fuse(model.eval())
images = torch.randn(2, 3, 160, 160)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    masks = model(images)["out"].argmax(1)
print(masks.shape)
