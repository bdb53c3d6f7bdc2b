"""Encoders and heads."""

from fastmoco.models.convnextv2 import CONVNEXTS as CONVNEXTS
from fastmoco.models.convnextv2 import ConvNeXtV2 as ConvNeXtV2
from fastmoco.models.heads import predictor as predictor
from fastmoco.models.heads import projector as projector
from fastmoco.models.positions import sincos_positions as sincos_positions
from fastmoco.models.resnet import RESNETS as RESNETS
from fastmoco.models.resnet import ResNet as ResNet
from fastmoco.models.resnet import resnet18 as resnet18
from fastmoco.models.resnet import resnet34 as resnet34
from fastmoco.models.resnet import resnet50 as resnet50
from fastmoco.models.resnet import resnet_nano as resnet_nano
from fastmoco.models.vit import ARCHITECTURES as ARCHITECTURES
from fastmoco.models.vit import VisionTransformer as VisionTransformer
from fastmoco.models.vit import deit_small as deit_small
from fastmoco.models.vit import vit_base as vit_base
from fastmoco.models.vit import vit_conv_base as vit_conv_base
from fastmoco.models.vit import vit_conv_small as vit_conv_small
from fastmoco.models.vit import vit_huge as vit_huge
from fastmoco.models.vit import vit_large as vit_large
from fastmoco.models.vit import vit_micro as vit_micro
from fastmoco.models.vit import vit_nano as vit_nano
from fastmoco.models.vit import vit_small as vit_small
from fastmoco.models.vit import vit_tiny as vit_tiny
