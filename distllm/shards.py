"""A model in one file of weights for each stage, so that a host needs only its own; and back again.

torch is imported only when a model is cut.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from tqdm import tqdm

from distllm.config import CHOICES, ModelConfig, QuantizationConfig, one_of
from distllm.core import ModelSizes
from distllm.plan.cut import cut_as_told, cut_by_bytes, cut_by_layers
from distllm.plan.partition import Split, human_bytes
from distllm.validation import validate_quantization

if TYPE_CHECKING:
    from distllm.model.blueprint import Blueprint
    from distllm.model.manifest import Manifest

logger = logging.getLogger(__name__)

# An ordinary checkpoint has files of about this size, as transformers writes them.
FILE_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]
"""Told how many bytes are done, and of how many."""


def shard_model(
    model: str | Path | ModelConfig,
    output: str | Path,
    *,
    stages: int | None = None,
    by: str = "bytes",
    layers: Sequence[int] | None = None,
    quantization: str | QuantizationConfig | None = None,
    progress: Progress = lambda _done, _total: None,
) -> tuple[Path, ...]:
    """Writes a model's tensors into one file for each stage, with a manifest and the small files.

    They stay as they are, and the folder is at the same time an ordinary checkpoint in several files; or the linear
    layers are quantized, so that nobody needs to do it again. The folder appears only when it is whole.

    Args:
        model: folder of a checkpoint, or a model configuration.
        output: a folder that is not there yet, or is empty.
        stages: how many files, of equal bytes or layers, as `by` says; or in `layers`, the layers of each.
        quantization: none, int8 or int4, or the section with its options; its `stages` are those of the files.

    Returns:
        The files of the stages, in order.

    Raises:
        ValueError, OSError: it cannot be used, cut so or written, or there is no room; the sentence says why.
    """
    from distllm.model import carve
    from distllm.model.folder import check_target, whole_folder

    quantization = QuantizationConfig.of(quantization)
    one_of("shard.by", by, CHOICES["shard.by"])
    validate_quantization(quantization)
    carve.check_storable(quantization)
    check_target(output)
    blueprint = _whole(model if isinstance(model, ModelConfig) else ModelConfig(path=str(model)))
    sizes = blueprint.sizes_with(quantization)
    spans = _cut(sizes.quantized or sizes, stages, by, layers)
    if beyond := [stage for stage in quantization.stages or () if stage >= len(spans)]:
        raise ValueError(f"quantization.stages names stage {beyond[0]}: there are stages 0 to {len(spans) - 1}")
    plots = carve.plots(blueprint, spans, quantization)
    small = carve.taken_along(blueprint.checkpoint.path)
    needed = sum(plot.nbytes for plot in plots) + sum(path.stat().st_size for path in small)
    count = _counted(progress, sum(info.nbytes for plot in plots for info in plot.tensors.values()))
    with whole_folder(output, needed) as folder:
        made = carve.carve(blueprint, plots, quantization, folder, count)
    for file in made.files:
        logger.info("%s holds %s, %s", file.name, file.span or "what no stage needs", human_bytes(file.bytes))
    return get_shard_paths(output)


def get_shard_paths(folder: str | Path) -> tuple[Path, ...]:
    """The files of the stages of a folder of shards, in the order of the pipeline, be they here or not.

    Raises:
        ValueError: the folder has no manifest of shards.
    """
    folder, manifest = _stored(folder)
    return tuple(folder / file.name for file in manifest.stages)


def reconstruct_model(
    folder: str | Path,
    output: str | Path,
    *,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda _done, _total: None,
) -> Path:
    """Writes the tensors of shards, bit for bit, as an ordinary checkpoint, and checks every sha256 on the way.

    Args:
        output: a folder that is not there yet, or is empty; it appears only when it is whole.
        file_bytes: about how large a file may get.

    Raises:
        ValueError: a file is missing, cut short, damaged or another one, or there is no room.
        OSError: it cannot be written.
    """
    from distllm.model import carve
    from distllm.model.folder import check_target, whole_folder

    check_target(output)
    folder, manifest = _stored(folder)
    carve.check_all(manifest, folder)
    needed = sum(file.bytes for file in manifest.files) + sum(file.bytes for file in manifest.small_files.values())
    count = _counted(progress, sum(tensor.bytes for file in manifest.files for tensor in file.tensors.values()))
    with whole_folder(output, needed) as part:
        carve.join(manifest, folder, part, file_bytes, count)
    return Path(output)


class Bar:
    """Progress on standard error, from the first byte to the last."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(desc=self._doing, total=total, unit="B", unit_scale=True, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(model: ModelConfig) -> Blueprint:
    """A model all of whose files are here; if they are shards themselves, each is the one of its manifest."""
    from distllm.engine.reader import open_blueprint

    blueprint = open_blueprint(replace(model, verify=True))
    if blueprint.checkpoint.quantization is not None:
        raise ValueError(
            f"{blueprint.checkpoint.path}: its weights are quantized already; cut the checkpoint that they are from"
        )
    blueprint.checkpoint.fetch({info.file for info in blueprint.checkpoint.tensors.values()})
    return blueprint


def _cut(sizes: ModelSizes, stages: int | None, by: str, layers: Sequence[int] | None) -> Split:
    if layers is not None:
        return cut_as_told(sizes, layers)
    if stages is None or stages < 1:
        raise ValueError(f"shard.stages={stages}: say how many files of stages to write, at least 1")
    return cut_by_bytes(sizes, stages) if by == "bytes" else cut_by_layers(sizes, stages)


def _stored(given: str | Path) -> tuple[Path, Manifest]:
    """A folder of shards and its manifest."""
    from distllm.model.checkpoint import read_manifest

    try:
        folder = Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{given}: {error}") from error
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    if (manifest := read_manifest(folder)) is None:
        raise ValueError(f"{folder}: has no manifest.json of shards; is it the folder that task=shard wrote?")
    return folder, manifest


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    """Counts bytes together for a progress that wants to know how many are done."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return add
