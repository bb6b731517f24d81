"""A few rows of text as a TensorFlow Datasets set, built by the test that reads it."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class Little(tfds.core.GeneratorBasedBuilder):
    """Questions about numbers."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "prompt": tfds.features.Text(),
            "completion": tfds.features.Text(),
            "talk": tfds.features.Sequence(message),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            talk = [{"role": "user", "content": f"é{i}?"}, {"role": "assistant", "content": str(i)}]
            yield i, {"prompt": f"Was kommt nach {i}? é:", "completion": f" {i + 1}", "talk": talk}
