"""From files to a dataset: units of input, a decision over all documents, shards; each done once, whoever does it.

Everything is made in one place (a hidden folder beside a local output; the output itself in object storage), named by
what it depends on. A preparation that was stopped finds there what it had finished and goes on. The manifest is written
last.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from conf.errors import DataError
from conf.schema import StorageConfig
from data.index import MANIFEST_NAME, SPLITS, InputRecord, Split, documents_name
from data.inputs import InputFile, input_files
from data.kafka import SCHEME, Topic, is_topic, offsets_after, topic_files
from data.near import BANDS, MIN_SIMILARITY, ROWS, SHINGLE_WORDS
from data.overlap import RUN_WORDS, Evaluation, evaluation_texts
from data.report import REPORT_NAME, Report
from data.runners import HERE_BYTES, Runner, ray_runner, run_here
from data.selection import make_shard, plan_shards, select
from data.shards import Access, Dataset
from data.steps import Steps, check_languages
from data.storage import Store
from data.tokenizer import Tokenizer
from data.tombstones import forgotten_ids, parent_and_name
from data.units import UNIT_BYTES, Job, messages_read, process, unit_name, units_of
from data.writer import DatasetFacts, IndexWriter, entry_from_json

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is finished, and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingestion:
    """What is prepared, into what, and how.

    Attributes:
        inputs: files, folders, URIs, `shipped:NAME`s or topics.
        output: folder or URI to make; it must not hold anything yet.
        tokenizer: makes the tokens.
        steps: what is done to each document.
        held_out_fraction: share of documents, chosen by hash of their content, that goes to the held-out split.
        text_field: column or key of the text in parquet and jsonl.
        decontaminate: datasets whose held-out documents, and texts all of whose documents, are kept out of training.
        tombstones: folders whose forgotten documents are left out, besides the one that the output is in.
        after: dataset after whose offsets its topics are read; None: from where the inputs say.
        block_tokens: tokens that are read at once; None: the usual.
        unit_bytes: input that one process does at a time.
        storage: how storage is spoken to.
        resumable: whether what was finished is kept when this is stopped, and found by the next that makes `output`.
        on_ray: whether Ray Data does it; None: where there is more input than `HERE_BYTES`, or a cluster is given.
        ray_address: of a cluster to do it on.
    """

    inputs: Sequence[str]
    output: str
    tokenizer: Tokenizer
    steps: Steps
    held_out_fraction: float
    text_field: str = "text"
    decontaminate: tuple[str, ...] = ()
    tombstones: tuple[str, ...] = ()
    after: str | None = None
    block_tokens: int | None = None
    unit_bytes: int = UNIT_BYTES
    storage: StorageConfig = field(default_factory=StorageConfig)
    resumable: bool = True
    on_ray: bool | None = None
    ray_address: str | None = None


def ingest(wanted: Ingestion, progress: Progress = lambda what, done, total: None) -> tuple[Dataset, Report]:
    """Make a dataset. A local one appears whole, by rename, or not at all; in object storage the manifest comes last.

    Raises:
        DataError: an input is missing or unreadable, a split would be empty, or the output cannot be written.
        UserError: Ray does not do it.
    """
    fraction = wanted.held_out_fraction
    if not 0 < fraction < 0.5:
        raise DataError(f"held-out fraction {fraction}: it must be above 0 and below 0.5, e.g. 0.05.")
    check_languages(wanted.steps.languages)
    with _Place.of(wanted) as place:
        files = _files(wanted, place.store)
        large = sum(file.num_bytes for file in files) > HERE_BYTES
        on_ray = wanted.on_ray if wanted.on_ray is not None else large or wanted.ray_address is not None
        runner: AbstractContextManager[Runner] = nullcontext(run_here)
        if on_ray:
            runner = ray_runner(wanted.ray_address)
        with runner as run:
            report = _make(wanted, place, files, _Steady(run, progress))
        place.publish()
    return Dataset.open(wanted.output, Access(storage=wanted.storage)), report


def _files(wanted: Ingestion, store: Store) -> list[InputFile]:
    """The files and the stretches of topics that are the input."""
    topics = [location for location in wanted.inputs if is_topic(location)]
    after: dict[str, dict[int, int]] = {}
    if wanted.after is not None:
        after = offsets_after(Dataset.open(wanted.after, Access(storage=wanted.storage)).manifest.inputs)
        for name in {Topic.parse(location).name for location in topics} - {*after}:
            raise DataError(f"--after {wanted.after}: was not made from topic '{name}', but from: {', '.join(after)}.")
        if not topics:
            raise DataError(f"--after {wanted.after}: says where topics go on, and no input is one ({SCHEME}...).")
    files: list[InputFile] = []
    for location in wanted.inputs:
        if is_topic(location):
            files += topic_files(location, after, store)
        else:
            files += input_files([location], wanted.storage)
    if topics and not any(file.num_bytes for file in files):
        since = f" after {wanted.after}" if wanted.after else ""
        raise DataError(f"{', '.join(topics)}: there is no message{since}. Nothing was made.")
    return files


class _Steady:
    """A runner that says how far it is."""

    def __init__(self, run: Runner, progress: Progress) -> None:
        self._run = run
        self._progress = progress

    def results(self, what: str, task: Callable[[str], str], items: Sequence[str], num_done: int = 0) -> dict[str, str]:
        """Each item's result."""
        total = num_done + len(items)
        self._progress(what, num_done, total)
        results = {}
        for item, result in self._run(task, items):
            results[item] = result
            self._progress(what, num_done + len(results), total)
        return results


def _make(wanted: Ingestion, place: _Place, files: Sequence[InputFile], steady: _Steady) -> Report:
    """Units, decision, shards, index."""
    store = place.store
    job = _job(wanted, store)
    units = units_of(files, job, wanted.unit_bytes)
    there = store.sizes("work/units")
    left = [unit for unit in units if unit_name(unit.key) not in there]
    steady.results("text", functools.partial(process, job), [unit.to_json() for unit in left], len(units) - len(left))

    forgotten = forgotten_ids([parent_and_name(place.output)[0], *wanted.tombstones], wanted.storage)
    report = Report(made_with=_made_with(wanted, job))
    near = wanted.steps.near_duplicates
    selection = select(store, units, forgotten, report, near_duplicates=near)
    plans = plan_shards(store, units, job, selection, report)
    report.finish()
    _check_not_empty(report, wanted.held_out_fraction)

    shards = steady.results("shards", functools.partial(make_shard, job), plans)
    lineage = messages_read(store, units, files)
    unhashed = {file.to_json(): file for file in files if file not in lineage}
    hashed = steady.results("hashes", functools.partial(_hash_file, wanted.storage), list(unhashed))
    for text, file in unhashed.items():
        lineage[file] = InputRecord(path=file.name, num_bytes=file.num_bytes, sha256=hashed[text])
    entries = [entry_from_json(shards[plan]) for plan in plans]
    names = {name for entry in entries for name in (entry.path, documents_name(entry.path))}
    for split in SPLITS:
        # What an earlier attempt left: shards of other options, half-written files; parts of the index come after.
        for name in store.sizes(split).keys() - names:
            store.delete(name)
    index = IndexWriter(store, job.facts)
    for entry in entries:
        split_of_entry: Split = "train" if entry.path.startswith("train/") else "held_out"
        index.add(split_of_entry, entry)
    duplicates = report.dropped["duplicate"].documents if "duplicate" in report.dropped else 0
    manifest = index.finish(num_duplicates=duplicates, inputs=[lineage[file] for file in files])
    if wanted.steps.rows:
        store.write(REPORT_NAME, report.to_json(manifest.identity))
    place.clear_work()
    return report


def _job(wanted: Ingestion, store: Store) -> Job:
    tokenizer = wanted.tokenizer
    facts = DatasetFacts(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        held_out_fraction=wanted.held_out_fraction,
    )
    evaluation = None
    if wanted.decontaminate:
        texts = evaluation_texts(wanted.decontaminate, tokenizer, wanted.storage, wanted.text_field)
        content = Evaluation.of(texts).hashes.tobytes()
        evaluation = f"work/evaluation-{hashlib.sha256(content).hexdigest()[:32]}.u64"
        store.write(evaluation, content)
    return Job(
        location=store.location,
        storage=wanted.storage,
        steps=wanted.steps,
        facts=facts if wanted.block_tokens is None else replace(facts, block_tokens=wanted.block_tokens),
        text_field=wanted.text_field,
        tokenizer=tokenizer.content,
        evaluation=evaluation,
    )


def _made_with(wanted: Ingestion, job: Job) -> dict[str, object]:
    libraries = ("tokenizers", "pyarrow", "rensa", "py3langid")
    return {
        "steps": asdict(wanted.steps),
        "near_duplicates": {"words": SHINGLE_WORDS, "bands": BANDS, "rows": ROWS, "similarity": MIN_SIMILARITY},
        "decontaminate": {"words": RUN_WORDS, "against": list(wanted.decontaminate)},
        "held_out_fraction": wanted.held_out_fraction,
        "tokenizer_sha256": job.facts.tokenizer_sha256,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _check_not_empty(report: Report, held_out_fraction: float) -> None:
    total = sum(report.kept.values())
    if not total:
        why = ", ".join(f"{found.documents} {reason}" for reason, found in report.dropped.items() if reason != "empty")
        if why:
            raise DataError(
                f"none of {report.documents} documents is kept ({why}). Loosen or switch off what drops them."
            )
        raise DataError(
            "the input has no text in it (only empty documents or none at all). Give at least two documents."
        )
    for split, count in report.kept.items():
        if not count:
            raise DataError(
                f"none of {total} documents fell to the {split} split at held_out_fraction={held_out_fraction}. "
                "Models are judged on documents they never saw, so both splits must have some: "
                "cut the text into more documents, or change the fraction."
            )


def _hash_file(storage: StorageConfig, file: str) -> str:
    return InputFile.from_json(file).sha256(storage)


class _Place:
    """Where a dataset is made before it is whole.

    Attributes:
        output: where it will be, absolute.
        store: where it is made.
    """

    def __init__(self, output: str, store: Store, resumable: bool) -> None:
        self.output = output
        self.store = store
        self._resumable = resumable
        self._published = False

    @classmethod
    @contextlib.contextmanager
    def of(cls, wanted: Ingestion) -> Iterator[_Place]:
        """The place for a preparation, with what an earlier one left there.

        Raises:
            DataError: the output holds something, is being made by another process, or cannot be written.
        """
        if "://" in wanted.output:
            with cls._stored(wanted) as place:
                yield place
        else:
            try:
                with cls._local(wanted) as place:
                    yield place
            except OSError as error:
                raise DataError(
                    f"{wanted.output}: cannot be written ({error}). Choose a folder with room that you may write to."
                ) from error

    @classmethod
    @contextlib.contextmanager
    def _local(cls, wanted: Ingestion) -> Iterator[_Place]:
        output = Path(wanted.output).expanduser().absolute()
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"{output}: is there already. Remove it or choose another output.")
        suffix = "" if wanted.resumable else f"-{uuid.uuid4().hex[:12]}"
        partial = output.parent / f".{output.name}.partial{suffix}"
        partial.mkdir(parents=True, exist_ok=True)
        place = _LocalPlace(str(output), Store.open(partial), wanted.resumable)
        with (partial / ".lock").open("w") as lock:
            try:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(
                    f"{output}: is being prepared by another process ({partial} is locked). Wait for it."
                ) from None
            try:
                yield place
            finally:
                place.leave(partial)

    @classmethod
    @contextlib.contextmanager
    def _stored(cls, wanted: Ingestion) -> Iterator[_Place]:
        store = Store.open(wanted.output, wanted.storage)
        found = store.sizes("")
        if found and (MANIFEST_NAME in found or not any(name.startswith("work/") for name in found)):
            raise DataError(f"{wanted.output}: is there already. Remove it or choose another output.")
        yield cls(store.location, store, resumable=True)

    def clear_work(self) -> None:
        """Remove what only the making needed."""
        for name in self.store.sizes("work"):
            self.store.delete(name)

    def publish(self) -> None:
        """Make the dataset appear."""


class _LocalPlace(_Place):
    """A hidden folder, renamed at the end."""

    def clear_work(self) -> None:
        shutil.rmtree(Path(self.store.location) / "work", ignore_errors=True)

    def publish(self) -> None:
        partial = Path(self.store.location)
        (partial / ".lock").unlink()
        partial.rename(self.output)
        self._published = True

    def leave(self, partial: Path) -> None:
        """Remove what nobody can go on from."""
        if not self._published and not (self._resumable and any(partial.glob("work/units/*"))):
            shutil.rmtree(partial, ignore_errors=True)
