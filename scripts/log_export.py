"""Exports training runs from their log.jsonl to TensorBoard and to Weights & Biases.

    python3 scripts/log_export.py log/nsa log/full --tensorboard tb     then: tensorboard --logdir tb
    python3 scripts/log_export.py log/nsa log/full --wandb wb           then: wandb sync wb/wandb/offline-run-*

A run is an output folder of the trainer (-o) or its log.jsonl. It has the name of its folder, or NAME for an
argument NAME=FOLDER. --tensorboard needs the package tensorboard, and replaces an earlier export of the run.
--wandb needs the package wandb, writes an offline run, and sends nothing; only wandb sync does. Steps that a
resumed run repeated appear once. NaN and Inf are left out.
"""

import argparse
import glob
import hashlib
import os

from train_log import Parser, die, read_run, run_main

TRAIN_METRICS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "norm": "train/gradient_norm",
    "tokens": "train/tokens",
    "ms": "speed/milliseconds",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_bytes",
}
VAL_METRICS = {
    "val_loss": "validation/loss",
    "val_perplexity": "validation/perplexity",
    "val_bits_per_byte": "validation/bits_per_byte",
}


def recall_metrics(row):
    """Returns the accuracy over all distances and for each range of distances, named by its start."""
    asked, right = (sum(bucket[field] for bucket in row["recall"]) for field in ("asked", "right"))
    metrics = {"recall/all": right / asked} if asked else {}
    for bucket in row["recall"]:
        if bucket["asked"]:
            metrics[f"recall/from_{bucket['from']:06d}"] = bucket["right"] / bucket["asked"]
    return metrics


def position_metrics(row):
    """Returns the loss for each range of positions, named by its start."""
    return {f"validation/loss_from_{b['from']:07d}": b["loss"] for b in row["position_loss"] if b["loss"] is not None}


def gate_metrics(row):
    """Returns the mean gate of each branch and layer."""
    branches = ("compressed", "selected", "sliding")
    return {f"gates/{branch}/layer_{layer:02d}": gate for layer, gates in enumerate(row["gates"])
            for branch, gate in zip(branches, gates) if gate is not None}


def choice_metrics(row):
    name, count = f"multiple_choice/{row['multiple_choice']}", row["examples"]
    return {name: row["right"] / count, name + "_normalized": row["right_normalized"] / count}


def needle_metrics(row):
    """Returns the accuracy for each length."""
    metrics = {}
    for length in sorted({cell["length"] for cell in row["cells"]}):
        cells = [cell for cell in row["cells"] if cell["length"] == length]
        right, asked = (sum(cell[field] for cell in cells) for field in ("right", "asked"))
        metrics[f"needle/{row['needle']}_{length:07d}"] = right / asked
    return metrics


def metrics_by_step(run):
    """Returns [(step, time, {metric: value})], in the order of the steps."""

    def named(names):
        return lambda row: {name: row[field] for field, name in names.items() if row.get(field) is not None}

    steps = {}
    for rows, metrics_of in ((run.train, named(TRAIN_METRICS)), (run.val, named(VAL_METRICS)),
                             (run.positions, position_metrics), (run.recall, recall_metrics),
                             (run.gates, gate_metrics), (run.choices, choice_metrics), (run.needles, needle_metrics)):
        for row in rows:
            found = metrics_of(row)
            time, metrics = steps.setdefault(row["step"], (row["time"], {}))
            metrics.update(found)
    return [(step, *steps[step]) for step in sorted(steps)]


def import_tensorboard():
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as e:
        die(f"--tensorboard: the package tensorboard is missing ({e}); run pip install tensorboard")
    return event_pb2.Event, summary_pb2.Summary, text_pb, RecordWriter


def import_wandb():
    try:
        import wandb
    except ImportError as e:
        die(f"--wandb: the package wandb is missing ({e}); run pip install wandb")
    return wandb


def configuration(run):
    """Returns the first line of the log as {name: value}, such as flags.b."""
    config = {}
    for key, value in run.start.items():
        if isinstance(value, dict):
            config.update({f"{key}.{name}": part for name, part in value.items()})
        else:
            config[key] = value
    return config


def export_tensorboard(run, folder, package):
    """Writes one event file, folder/NAME/events.out.tfevents.log_export."""
    Event, Summary, text_pb, RecordWriter = package
    steps, config = metrics_by_step(run), configuration(run)
    path = os.path.join(folder, run.name, "events.out.tfevents.log_export")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            writer = RecordWriter(file)
            begin = steps[0][1]
            writer.write(Event(wall_time=begin, file_version="brain.Event:2").SerializeToString())
            table = "\n".join(["| name | value |", "| --- | --- |"] + [f"| {k} | {v} |" for k, v in config.items()])
            if config:
                writer.write(Event(wall_time=begin, summary=text_pb("configuration", table)).SerializeToString())
            for step, time, metrics in steps:
                values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
                writer.write(Event(wall_time=time, step=step, summary=Summary(value=values)).SerializeToString())
        os.replace(path + ".tmp", path)
    except OSError as e:
        die(f"--tensorboard {folder}: {e.filename or path}: {e.strerror}")
    print(f"wrote {path}: {len(steps)} steps")


def wandb_id(run):
    """Returns an id that stays the same when the run goes on."""
    return hashlib.sha256(f"{run.name} {run.first_date or os.path.abspath(run.file)}".encode()).hexdigest()[:12]


def check_wandb_folder(run, folder):
    for earlier in glob.glob(os.path.join(glob.escape(folder), "wandb", "offline-run-*-" + wandb_id(run))):
        die(f"{run.file}: already exported to {earlier}; remove that folder to export the run again")


def export_wandb(run, folder, wandb):
    """Writes an offline run to folder/wandb."""
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True,
                              x_disable_meta=True)
    steps = metrics_by_step(run)
    try:
        os.makedirs(folder, exist_ok=True)
        output = wandb.init(mode="offline", dir=folder, project="train_gpt_nsa", name=run.name, id=wandb_id(run),
                            config=configuration(run), settings=settings)
        for step, time, metrics in steps:
            output.log({**metrics, "_timestamp": time}, step=step)
        path = os.path.dirname(output.dir)
        output.finish()
    except (OSError, wandb.Error) as e:
        die(f"--wandb {folder}: {getattr(e, 'strerror', None) or e}")
    print(f"wrote {path}: {len(steps)} steps")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER")
    parser.add_argument("--tensorboard", metavar="DIR", help="write TensorBoard's event files to DIR/NAME")
    parser.add_argument("--wandb", metavar="DIR", help="write offline runs of Weights & Biases to DIR/wandb")
    args = parser.parse_args()
    if not args.tensorboard and not args.wandb:
        die("nothing to export to: give --tensorboard DIR or --wandb DIR")
    runs = [read_run(argument) for argument in args.runs]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            die(f"two runs have the name {name}; give them names with NAME=FOLDER")
    tensorboard = args.tensorboard and import_tensorboard()
    wandb = args.wandb and import_wandb()
    if wandb:
        for run in runs:
            check_wandb_folder(run, args.wandb)
    for run in runs:
        if tensorboard:
            export_tensorboard(run, args.tensorboard, tensorboard)
        if wandb:
            export_wandb(run, args.wandb, wandb)


if __name__ == "__main__":
    run_main(main, "run the same command again")
