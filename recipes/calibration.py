"""Text that a model is looked at with, kept apart from the text it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from conf.errors import DataError
from conf.schema import CalibrationConfig, EvaluateStage, RunConfig
from data.batch import Batch
from data.held_out import held_out_documents
from data.order import key_of
from data.samples import StreamSpec
from data.shards import Dataset, TokenDocument
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
    judged = {digest_of(document): f"{source}: {document.id}" for source, document in _evaluated(config, datasets)}
    for sample in stream.samples(stream.sample_ids(0)):
        dataset, length = datasets[sample.source], stream.spec.sequence_length
        for number in dataset.document_numbers("train", sample.first_token, length + 1):
            document = dataset.document("train", number)
            if digest_of(document) in judged:
                raise DataError(
                    f"calibration document {sample.source}: {document.id} is also evaluated on, as "
                    f"{judged[digest_of(document)]} (equal hashes): scores would be flattered. Prepare the calibration "
                    "source without it, or name another source."
                )


def _evaluated(config: RunConfig, datasets: Mapping[str, Dataset]) -> Iterator[tuple[str, TokenDocument]]:
    for stage in (config.stages[name] for name in config.order):
        if isinstance(stage, EvaluateStage):
            for source in stage.sources:
                for document in held_out_documents(datasets[source], stage.tokens):
                    # The last one may be cut; equal documents are equal whole.
                    yield source, datasets[source].document("held_out", document.number)


def digest_of(document: TokenDocument) -> bytes:
    """Hash of a document's tokens."""
    return hashlib.blake2b(document.tokens.astype("<u4").tobytes(), digest_size=16).digest()
