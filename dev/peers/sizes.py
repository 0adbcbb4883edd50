"""The sizes of NSA in all measurements."""

CMP = dict(cmp_len=32, cmp_stride=16)
BLOCKS = dict(block=64, topk=16, init_blocks=1, local_blocks=2)
WINDOW = 512  # keys that a query sees, itself included
HEAD_DIM = 128
