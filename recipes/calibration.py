"""Text that a model is looked at with, kept apart from the text it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from conf.errors import DataError
from conf.schema import CalibrationConfig, EvaluateStage, RunConfig
from data.batch import Batch
from data.held_out import held_out_documents, texts_in_place
from data.index import Split
from data.order import key_of
from data.samples import StreamSpec
from data.shards import Dataset
from data.stream import Stream
from parallel.mesh import Coordinate, Mesh
from recipes.stage import StageInput


def calibration_batches(
    given: StageInput, config: CalibrationConfig, mesh: Mesh, place: Coordinate, *, use: str = "calibration"
) -> list[Batch]:
    """This data rank's micro-batches of the calibration text; another text for another use.

    Raises:
        DataError: there is too little text, or a document of it is one that models are evaluated on.
    """
    stream = _stream(given, config, use=use)

    def read() -> list[Batch]:
        # By one for all: it reads all that is evaluated on.
        if given.context.is_first:
            refuse_overlap(given.context.config, given.datasets, stream)
        return stream.batches(0, place.data, mesh.data)

    return given.reading.of_all_ranks(read)


def search_batches(
    given: StageInput, config: CalibrationConfig, tokens: int, mesh: Mesh, place: Coordinate
) -> list[Batch]:
    """This data rank's micro-batches of the text that candidate shapes are scored on.

    Training text as well, in another order: what a choice is made by must not be what its result is judged by.
    """
    stream = _stream(given, replace(config, tokens=tokens), use="search")
    return given.reading.of_all_ranks(lambda: stream.batches(0, place.data, mesh.data))


def num_rows(config: CalibrationConfig) -> int:
    """Rows of the calibration text."""
    return -(-config.tokens // config.sequence_length)


def _stream(given: StageInput, config: CalibrationConfig, *, use: str) -> Stream:
    """A stream whose first step is all the text."""
    return Stream(
        given.datasets,
        StreamSpec(
            mixtures=[(0, config.mixture)],
            seed=key_of(given.context.config.seed, given.name, use),
            sequence_length=config.sequence_length,
            global_batch=num_rows(config),
            micro_batch=config.micro_batch,
            reset_at_documents=given.context.config.data.reset_at_documents,
        ),
    )


def refuse_overlap(config: RunConfig, datasets: Mapping[str, Dataset], stream: Stream) -> None:
    """See to it that no document of the stream's first step is one that models are evaluated on, by hash.

    Raises:
        DataError: names the document.
    """
    judged = dict(_evaluated(config, datasets))
    calibrated: dict[str, set[int]] = {}
    for sample in stream.samples(stream.sample_ids(0)):
        numbers = datasets[sample.source].document_numbers("train", sample.first_token, stream.spec.sequence_length + 1)
        calibrated.setdefault(sample.source, set()).update(numbers)
    for source, seen in calibrated.items():
        for digest, document in _digests(datasets[source], "train", sorted(seen)):
            if digest in judged:
                raise DataError(
                    f"calibration document {source}: {document} is also evaluated on, as {judged[digest]} (equal "
                    "hashes): scores would be flattered. Prepare the calibration source without it, or name another "
                    "source."
                )


def _evaluated(config: RunConfig, datasets: Mapping[str, Dataset]) -> Iterator[tuple[bytes, str]]:
    for stage in (config.stages[name] for name in config.order):
        if isinstance(stage, EvaluateStage):
            for source in stage.sources:
                numbers = [document.number for document in held_out_documents(datasets[source], stage.tokens)]
                for digest, document in _digests(datasets[source], "held_out", numbers):
                    yield digest, f"{source}: {document}"


def _digests(dataset: Dataset, split: Split, numbers: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    """Hash of the tokens of each document, whole, and its name."""
    documents = dataset.places(split, numbers)
    ranges = [(document.first_token, document.num_tokens) for document in documents]
    for place, tokens in texts_in_place(dataset, split, ranges):
        yield hashlib.blake2b(tokens.tobytes(), digest_size=16).digest(), documents[place].id
