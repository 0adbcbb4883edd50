"""libfsa by ctypes: the structs of fsa.h, the library's functions, and its errors as Python exceptions.

The library is `libfsa.so` beside this file. The environment variable LIBFSA names another one. It is loaded at the
first call on a GPU, so the package can be imported without a GPU and without the library.
"""

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

VERSION = (0, 1, 0)  # FSA_VERSION_MAJOR, MINOR and PATCH of the fsa.h that the structs below mirror

PHI_MEAN, PHI_LINEAR = 0, 1  # FsaPhi
RULES = {"causal": 0, "window": 1, "compressed": 2}  # FsaVisibility
BF16, FP16 = 0, 1  # FsaDtype
(
    FORWARD,
    BACKWARD,
    SELECTED_FORWARD,
    SELECTED_BACKWARD,
    SELECT_BLOCKS,
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
) = range(7)
ERROR_CONFIG, ERROR_ARGUMENT = 1, 2


def _fields(**types):
    """Returns ctypes fields. A key has the names of one type, separated by `__`."""
    return [(name, kind) for names, kind in types.items() for name in names.split("__")]


class FsaConfig(Structure):
    _fields_ = _fields(
        q_heads__kv_heads__head_dim__cmp_len__cmp_stride__block__topk__init_blocks__local_blocks__window=c_int,
        phi__gate_per_token=c_int,
        scale=c_float,
        recompute=c_int,
        reserved=c_int * 4,
    )


class FsaDeviceBatch(Structure):
    _fields_ = _fields(
        num_queries__num_keys__num_seqs__num_segments=c_int64,
        cu_seqlens__segments=c_void_p,
        reserved=c_int64 * 2,
    )


class FsaPhiWeights(Structure):
    _fields_ = _fields(wk__pe__wv=c_void_p)


class FsaPhiGradients(Structure):
    _fields_ = _fields(dwk__dpe__dwv=c_void_p)


class _Arguments(Structure):
    """An argument struct. Its first field is its size; a field that is not set is 0."""

    def __init__(self, **fields):
        super().__init__(size=ctypes.sizeof(self), **fields)


class FsaForward(_Arguments):
    _anonymous_ = ("phi",)  # its fields are attributes of this struct too
    _fields_ = _fields(
        size=c_size_t,
        q__k__v__gate_logits=c_void_p,
        q_stride__k_stride__v_stride__gate_stride=c_int64,
        phi=FsaPhiWeights,
        inv_freq__block_indices__o=c_void_p,
        o_stride=c_int64,
        saved__workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaBackward(_Arguments):
    _anonymous_ = ("phi", "dphi")
    _fields_ = _fields(
        size=c_size_t,
        k__v__gate_logits__dout=c_void_p,
        k_stride__v_stride__gate_stride__dout_stride=c_int64,
        phi=FsaPhiWeights,
        inv_freq__saved__dq__dk__dv__dgate_logits=c_void_p,
        dq_stride__dk_stride__dv_stride__dgate_stride=c_int64,
        dphi=FsaPhiGradients,
        workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaSelectedForward(_Arguments):
    _fields_ = _fields(
        size=c_size_t,
        q__k__v=c_void_p,
        q_stride__k_stride__v_stride=c_int64,
        block_indices__o__lse=c_void_p,
        o_stride=c_int64,
        workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaSelectedBackward(_Arguments):
    _fields_ = _fields(
        size=c_size_t,
        q__k__v__o__dout=c_void_p,
        q_stride__k_stride__v_stride__o_stride__dout_stride=c_int64,
        lse__block_indices__dq__dk__dv=c_void_p,
        dq_stride__dk_stride__dv_stride=c_int64,
        workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaSelectBlocks(_Arguments):
    _fields_ = _fields(
        size=c_size_t,
        q__kc=c_void_p,
        q_stride__kc_stride=c_int64,
        lse_c__block_indices__workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaAttentionForward(_Arguments):
    _fields_ = _fields(
        size=c_size_t,
        rule=c_int,
        q__k__v=c_void_p,
        q_stride__k_stride__v_stride=c_int64,
        inv_freq__o__lse=c_void_p,
        o_stride=c_int64,
        workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


class FsaAttentionBackward(_Arguments):
    _fields_ = _fields(
        size=c_size_t,
        rule=c_int,
        q__k__v__o__dout=c_void_p,
        q_stride__k_stride__v_stride__o_stride__dout_stride=c_int64,
        inv_freq__lse__dq__dk__dv=c_void_p,
        dq_stride__dk_stride__dv_stride=c_int64,
        workspace=c_void_p,
        workspace_bytes=c_size_t,
    )


STRUCTS = (FsaConfig, FsaDeviceBatch, FsaPhiWeights, FsaPhiGradients, FsaForward, FsaBackward, FsaSelectedForward,
           FsaSelectedBackward, FsaSelectBlocks, FsaAttentionForward, FsaAttentionBackward)  # fmt: skip
OPERATIONS = (  # the functions and their argument structs, in the order of FsaOperation
    ("fsa_forward", FsaForward),
    ("fsa_backward", FsaBackward),
    ("fsa_selected_forward", FsaSelectedForward),
    ("fsa_selected_backward", FsaSelectedBackward),
    ("fsa_select_blocks", FsaSelectBlocks),
    ("fsa_attention_forward", FsaAttentionForward),
    ("fsa_attention_backward", FsaAttentionBackward),
)


@functools.lru_cache(maxsize=None)
def load():
    """Returns the loaded library.

    Raises:
        RuntimeError: the library is missing, cannot be loaded, or has another version.
    """
    path = os.environ.get("LIBFSA") or os.path.join(os.path.dirname(os.path.abspath(__file__)), "libfsa.so")
    if not os.path.exists(path):
        raise RuntimeError(f"libfsa.so: not found at {path}; build it with `make libfsa.so` and set LIBFSA to its "
                           "path, or install the package with `pip install ./fsa/torch`")  # fmt: skip
    try:
        library = ctypes.CDLL(path)
        library.fsa_version.restype = c_int
        version = divmod(library.fsa_version(), 1000)
        if version[0] != VERSION[0] or version[1] < VERSION[1]:
            raise RuntimeError(f"libfsa.so: version {version[0]}.{version[1]} at {path}; must be {VERSION[0]}.{VERSION[1]} "
                               f"or a later {VERSION[0]}.x; build it from the sources of this package")  # fmt: skip
        config, batch = POINTER(FsaConfig), POINTER(FsaDeviceBatch)
        for name, arguments in OPERATIONS:
            getattr(library, name).argtypes = [config, c_int, batch, POINTER(arguments), c_void_p]
        library.fsa_last_error.restype = c_char_p
        library.fsa_workspace_size.argtypes = [config, c_int, batch, c_int]
        library.fsa_workspace_size.restype = c_size_t
        library.fsa_saved_size.argtypes = [config, c_int, batch]
        library.fsa_saved_size.restype = c_size_t
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"libfsa.so: cannot be loaded from {path}: {error}") from None
    return library


def fail(status):
    """Raises the last error of the calling thread: ValueError for a wrong argument or configuration, RuntimeError for
    others. `status` is an FsaStatus; 0: of a function that returned 0 bytes."""
    message = load().fsa_last_error().decode(errors="replace")
    raise (ValueError if status in (0, ERROR_CONFIG, ERROR_ARGUMENT) else RuntimeError)(message)
