"""close_branch.py: copies a checkpoint with nsa, with the gates of a branch closed. The loss of the copy, validated with
-val 1, says how much the trained model uses the branch:

    python3 dev/results/close_branch.py log/learning/nsa-1/ckpt_00001526.bin selected -o no_selected.bin
    ./train_gpt_nsa -e no_selected.bin -val 1 -t 16384 -b 4 -j 'data/linux/linux_val_*.bin'
"""

import os
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
sys.path[:0] = [os.path.join(ROOT, d) for d in ("scripts/hf", "data")]
from shards import Parser, die, run_main  # noqa: E402

BRANCHES = ("compressed", "selected", "sliding")  # in the order of the gate logits of a head (llmc/config.h)
CLOSED = -100.0  # the bias of a gate's logit; sigmoid(-100) is 4e-44


def main():
    parser = Parser(description="Copies a checkpoint with the gates of a branch closed.")
    parser.add_argument("checkpoint", help="a ckpt_*.bin of a run with nsa")
    parser.add_argument("branch", choices=BRANCHES)
    parser.add_argument("-o", metavar="FILE", required=True, dest="output", help="the copy, without AdamW's state")
    args = parser.parse_args()
    import checkpoint
    import numpy as np

    reader = checkpoint.Reader(args.checkpoint)
    if reader.model["attn"] != checkpoint.NSA:
        die(f"{args.checkpoint}: its attention is {checkpoint.ATTN_NAMES[reader.model['attn']]}; give one with nsa")
    if reader.table != checkpoint.param_table(reader.model):
        die(f"{args.checkpoint}: checkpoint version 1; train it on for a step first")
    if os.path.exists(args.output):
        die(f"{args.output}: exists already; remove it or choose another name")
    first, count = BRANCHES.index(args.branch), checkpoint.num_gate_logits(reader.model)
    with checkpoint.Writer(args.output, reader.model, reader.seq_len) as out:
        for tensor in reader.table:
            pieces = reader.read(tensor)
            if tensor.name == "bgate":
                bias = np.concatenate([piece.copy() for piece in pieces])
                bias[first:count:3] = CLOSED
                pieces = [bias]
            for piece in pieces:
                out.write(piece)


if __name__ == "__main__":
    run_main(main, interrupted="nothing was written")
