"""The files of a Hugging Face folder besides config.json and the weights. from_hf.py keeps them in a folder
beside the checkpoint (NAME.hf for NAME.bin), and to_hf.py puts them into the folder that it makes."""

import os

from shards import read_input, write_file

NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)


def side_folder(checkpoint_path):
    base, end = os.path.splitext(checkpoint_path)
    return (base if end == ".bin" else checkpoint_path) + ".hf"


def read(folder):
    """Returns {name: content} of those of NAMES that the folder has."""
    paths = {name: os.path.join(folder, name) for name in NAMES}
    return {name: read_input(path) for name, path in paths.items() if os.path.exists(path)}


def write(folder, files):
    """Writes the files, and removes those of NAMES that an earlier model had."""
    os.makedirs(folder, exist_ok=True)
    for name in set(NAMES) - set(files):
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
    for name, content in files.items():
        write_file(os.path.join(folder, name), content)
