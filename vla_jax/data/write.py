"""Writes an RLDS dataset as tensorflow-datasets does. The only file of `data/` that uses TensorFlow; training never imports it.

Uses TFDS's shard writer directly: its builders want a registered class, and its SequentialWriter leaves the number of shards
out of the file names, where published data has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


def write(
    root: str | os.PathLike,
    name: str,
    version: str,
    features: Any,
    episodes: Iterable[Any],
    *,
    shards: int | None = 1,
    description: str = "",
    array_record: bool = False,
) -> str:
    """Writes ROOT/NAME/VERSION with a split `train`; returns that folder, which must not exist yet.

    features: a tfds FeaturesDict with `steps`; episodes: what its `encode_example` takes. TFDS orders the episodes by a hash of
    their number, so reading in file order is already mixed. shards None: as TFDS chooses by size. array_record: ArrayRecord instead of TFRecord files.
    """
    from tensorflow_datasets import core as tfds
    from tensorflow_datasets.core import example_serializer, file_adapters, naming, writer
    from tensorflow_datasets.core.utils import shard_utils

    formats = file_adapters.FileFormat
    file_format = formats.ARRAY_RECORD if array_record else formats.TFRECORD
    folder = os.path.join(root, name, version)
    info = tfds.DatasetInfo(
        builder=tfds.DatasetIdentity(name=name, version=tfds.Version(version), data_dir=folder, module_name="vla_jax.data.write"),
        description=description or name,
        features=features,
    )
    info.set_file_format(file_format)
    os.makedirs(info.data_dir)
    files = naming.ShardedFileTemplate(dataset_name=name, data_dir=info.data_dir, split="train", filetype_suffix=file_format.file_suffix)
    out = writer.Writer(
        serializer=example_serializer.ExampleSerializer(features.get_serialized_info()),
        filename_template=files,
        hash_salt="train",
        disable_shuffling=False,
        example_writer=writer.ExampleWriter(file_format=file_format),
        shard_config=shard_utils.ShardConfig(num_shards=shards),
    )
    for number, episode in enumerate(episodes):
        out.write(number, features.encode_example(episode))
    lengths, size = out.finalize()
    info.set_splits(tfds.SplitDict([tfds.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=files)]))
    info.write_to_directory(info.data_dir)
    return folder
