"""cuDNN's full attention, called through PyTorch."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

STEP = "full"


def version():
    if not torch.backends.cudnn.is_available():
        raise RuntimeError("this PyTorch has no cuDNN")
    number = torch.backends.cudnn.version()
    return f"cuDNN {number // 10000}.{number // 100 % 100}.{number % 100}, PyTorch {torch.__version__}"


def full(x):
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (x.q, x.k, x.v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o[0].transpose(0, 1)


PARTS = {"full": full}
BLOCKS = {}
