"""The systems that dev/peers compares: one module each. A module has

version()  the version in words; raises ImportError or RuntimeError with the reason where the system cannot run
PARTS      {part: function}: the function takes the tensors of harness.Tensors and returns o [n, Hq, d], differentiable
           in the inputs of the part unless the part is in FORWARD_ONLY
BLOCKS     {part: function}: the block indices [Hkv, n, T] that the whole attention selects, for the check
STEP       the part that a training step takes; a module without it runs no training step
refuses(part, n, hq, hkv)  optional: the reason why a shape is not supported, or None
"""
